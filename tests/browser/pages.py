"""What every page that a browser shows must hold: width, quiet, no network, contrast."""

_WEAK = """
(() => {
  const channels = css => css.match(/[\\d.]+/g).map(Number);
  const light = css => channels(css).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const css = getComputedStyle(node).backgroundColor;
      if (channels(css)[3] !== 0) return css;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll(SELECTOR)].filter(node => node.textContent.trim())
    .map(node => {
      const style = getComputedStyle(node);
      const a = light(node.closest('svg') ? style.fill : style.color);
      const b = light(ground(node.closest('.plot') ?? node));
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent];
    }).filter(([contrast]) => contrast < 4.5);
})()
"""
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
           "Page.javascriptDialogOpening")


def weak_texts(browser, selector):
    """Texts whose contrast with their ground is below 4.5 (WCAG 2), with the contrast."""
    return browser.value(_WEAK.replace("SELECTOR", repr(selector)))


_OUTSIDE = """
[...document.querySelectorAll('body *')].filter(node => {
  if (node.closest('#js-plotly-tester, .js-plotly-plot svg')) return false;  // plotly's own care
  const box = node.getBoundingClientRect(), svg = node.ownerSVGElement;
  const room = svg ? svg.getBoundingClientRect() : {left: 0, right: window.innerWidth};
  return box.width > 0 && (box.right > room.right + 1 || box.left < room.left - 1);
}).map(node => `${node.tagName} ${node.id} ${node.textContent.slice(0, 40)}`)
"""
"""Elements that are cut at the right or left, by the window or by their drawing: also those that
one has to scroll to inside a box.
"""


def check_shown(browser, page, events, width):
    """The page is no wider than its window and nothing in it is cut; it writes nothing to the
    console, and asks for nothing but itself.
    """
    wide = browser.value("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width
    assert browser.value(_OUTSIDE) == []
    assert [event for event in events if event.get("method") in TROUBLE] == []
    asked = {event["params"]["request"]["url"] for event in events
             if event.get("method") == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
