/* Search for pages that are opened as files: browsers start no Worker there. The worker's script
   runs in a hidden frame instead, and messages go between the two windows. */
if (window.location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.onerror = null
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inner = frame.contentWindow
      this.inner = inner
      this.waiting = []
      inner.document.open()
      inner.document.write("<!doctype html><html><head></head><body></body></html>")
      inner.document.close()
      inner.postMessage = data => this.receive(data)
      inner.importScripts = (...urls) => urls.reduce(
        (done, next) => done.then(() => this.load(next)), Promise.resolve())
      this.load(url).then(() => {
        const messages = this.waiting
        this.waiting = null
        messages.forEach(data => this.send(data))
      })
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script")
        script.src = new URL(url, window.location).href
        script.onload = resolve
        script.onerror = reject
        this.inner.document.body.appendChild(script)
      })
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.send(data)
    }

    send(data) {
      const event = new this.inner.MessageEvent("message", {data})
      this.inner.dispatchEvent(event)
    }

    receive(data) {
      const event = new MessageEvent("message", {data})
      this.dispatchEvent(event)
      if (this.onmessage) this.onmessage(event)
    }

    terminate() {
      this.inner.frameElement.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
