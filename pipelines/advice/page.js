"use strict";
(() => {
  const advice = JSON.parse(document.getElementById("advice").textContent);
  const byId = new Map(advice.trials.map(trial => [trial.id, trial]));
  const search = advice.trials.filter(t => t.kind === "search" && t.status === "finished");
  const costs = {
    seconds: ["Training the stream, seconds", v => v],
    feature_bytes: ["Stored features, MB", v => v / 1e6],
    serving_macs: ["Serving, million multiply-adds an answer", v => v / 1e6]};
  let cost = "seconds";
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = depth => css(`--d${depth % 5}`);
  const share = v => `${(100 * v).toFixed(1)} %`;
  const narrow = () => window.innerWidth < 760;

  function layout(extra) {
    const axis = {gridcolor: css("--line"), linecolor: css("--soft"), zeroline: false,
                  automargin: true, title: {standoff: 8}};
    return {paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), hovermode: "closest",
            font: {color: css("--ink"), size: 13, family: getComputedStyle(document.body).fontFamily},
            margin: {l: 56, r: 16, t: 16, b: 48}, dragmode: false,
            legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
            hoverlabel: {bgcolor: css("--panel"), bordercolor: css("--soft"), font: {color: css("--ink")}},
            ...extra, xaxis: {...axis, ...extra.xaxis}, yaxis: {...axis, ...extra.yaxis}};
  }

  function draw(id, traces, extra) {
    const place = document.getElementById(id);
    Plotly.react(place, traces, layout(extra), {responsive: true, displayModeBar: false});
    if (!place.dataset.listens) {
      place.dataset.listens = "yes";
      place.on("plotly_click", event => {
        const trial = event.points[0].customdata;
        if (trial) show(trial, true);
      });
    }
  }

  function guessing(x) {
    const ends = [Math.min(...x), Math.max(...x)];
    return {name: `guessing, ${share(advice.chance)}`, mode: "lines", x: ends,
            y: ends.map(() => 100 * advice.chance), line: {color: css("--soft"), width: 1.5, dash: "dash"},
            hovertemplate: `guessing: ${share(advice.chance)}<extra></extra>`};
  }

  function interval(each) {
    return {type: "data", symmetric: false, thickness: 1.5, width: 5,
            array: each.map(v => 100 * (Math.min(1, v.high) - v.mean)),
            arrayminus: each.map(v => 100 * (v.mean - Math.max(0, v.low)))};
  }

  function depths() {
    const rows = advice.depths, x = rows.map(r => r.depth);
    const heads = rows.filter(r => r.separate_heads);
    const traces = [
      {name: "trials of the search", mode: "markers", x: search.map(t => t.depth),
       y: search.map(t => 100 * t.accuracy), customdata: search.map(t => t.id),
       marker: {size: 6, color: css("--soft"), opacity: 0.45},
       hovertemplate: "trial %{customdata}<br>%{y:.1f} %<extra></extra>"},
      {name: "partial hypernetwork", mode: "lines+markers", x, y: rows.map(r => 100 * r.accuracy.mean),
       error_y: interval(rows.map(r => r.accuracy)), customdata: rows.map(r => r.trial),
       line: {color: css("--accent"), width: 2}, marker: {size: 11, color: css("--accent")},
       hovertemplate: "depth %{x}: %{y:.1f} %<br>best trial %{customdata}<extra></extra>"}];
    if (heads.length) traces.push(
      {name: "one separate head a task", mode: "lines+markers", x: heads.map(r => r.depth),
       y: heads.map(r => 100 * r.separate_heads.mean), line: {color: css("--warm"), width: 2, dash: "dot"},
       error_y: interval(heads.map(r => r.separate_heads)),
       marker: {size: 10, color: css("--warm"), symbol: "diamond"},
       hovertemplate: "separate heads, depth %{x}: %{y:.1f} %<extra></extra>"});
    traces.push(guessing(x));
    draw("depths", traces, {
      margin: {l: 56, r: 16, t: narrow() ? 80 : 40, b: 48},
      xaxis: {tickvals: x, title: {text: "freeze depth"}}, yaxis: {title: {text: "held-out accuracy, %"}}});
  }

  function front() {
    const [title, scale] = costs[cost];
    const on = new Set(advice.front.trials);
    const groups = [...new Set(search.map(t => t.depth))].sort((a, b) => a - b);
    const traces = groups.map(depth => {
      const mine = search.filter(t => t.depth === depth);
      return {name: `depth ${depth}`, mode: "markers", x: mine.map(t => scale(t[cost])),
              y: mine.map(t => 100 * t.accuracy), customdata: mine.map(t => t.id),
              marker: {size: mine.map(t => on.has(t.id) ? 14 : 9), color: colour(depth),
                       line: {color: css("--ink"), width: mine.map(t => on.has(t.id) ? 2 : 0)}},
              hovertemplate: `trial %{customdata}, depth ${depth}<br>%{y:.1f} %, %{x:.3g}<extra></extra>`};
    });
    traces.push(guessing(search.map(t => scale(t[cost]))));
    draw("front", traces, {margin: {l: 56, r: 16, t: 40, b: 56},
      xaxis: {title: {text: title}, type: cost === "seconds" ? "log" : "linear",
              dtick: cost === "seconds" ? "D2" : undefined},
      yaxis: {title: {text: "held-out accuracy, %"}}});
  }

  function parallel() {
    const keys = Object.keys(advice.space).filter(k => k !== "defaults" && search.some(t => k in t.params)
      && new Set(search.map(t => JSON.stringify(t.params[k]))).size > 1);
    const axes = [...keys.map(key => scaleOf(key, t => t.params[key])), scaleOf("accuracy", t => t.accuracy)];
    const flat = narrow();  // on a phone the axes lie below each other, so that all fit the screen
    const place = document.getElementById("parallel");
    place.style.height = flat ? `${64 * axes.length + 40}px` : "";
    const traces = search.map(trial => {
      const points = axes.map((axis, i) => [i, axis.at(trial)]).filter(p => p[1] !== null);
      const along = points.map(p => p[0]), across = points.map(p => p[1]);
      return {mode: "lines+markers", x: flat ? across : along, y: flat ? along : across, showlegend: false,
              customdata: points.map(() => trial.id), opacity: 0.75,
              line: {color: colour(trial.depth), width: 1.6}, marker: {size: 6, color: colour(trial.depth)},
              text: points.map(p => `${axes[p[0]].label}: ${axes[p[0]].text(trial)}`),
              hovertemplate: "trial %{customdata}<br>%{text}<extra></extra>"};
    });
    const note = (x, y, text, more) => ({x, y, text, showarrow: false, font: {size: 12}, bgcolor: css("--paper"), borderpad: 1, ...more});
    const annotations = axes.flatMap((axis, i) => flat ? [
      note(0.5, i, axis.label, {yanchor: "bottom", yshift: 7, font: {size: 12, color: css("--soft")}}),
      note(0, i, axis.bottom, {xanchor: "left", yanchor: "top", yshift: -5}),
      note(1, i, axis.top, {xanchor: "right", yanchor: "top", yshift: -5})] : [
      note(i, 1.03, axis.top, {yanchor: "bottom"}), note(i, -0.03, axis.bottom, {yanchor: "top"})]);
    const steps = {tickvals: axes.map((_, i) => i), range: [-0.35, axes.length - 0.65]};
    draw("parallel", traces, flat ? {margin: {l: 12, r: 12, t: 24, b: 24}, annotations,
      xaxis: {visible: false, range: [-0.04, 1.04]},
      yaxis: {...steps, range: [axes.length - 0.5, -0.5], showticklabels: false}} :
      {margin: {l: 40, r: 48, t: 34, b: 76}, annotations,
        xaxis: {...steps, ticktext: axes.map(a => a.label.replace("_", "<br>")), tickangle: 0},
        yaxis: {visible: false, range: [-0.14, 1.14]}});
  }

  function scaleOf(key, read) {
    const label = key.split(".").pop();
    const plain = v => typeof v === "number" ? (Number.isInteger(v) ? String(v) : v.toPrecision(3))
      : Array.isArray(v) ? v.join("-") : String(v);
    const shown = key === "accuracy" ? share : plain;
    const values = search.map(read).filter(v => v !== undefined);
    const dimension = advice.space[key] || {};
    if (values.every(v => typeof v === "number") && !("choice" in dimension)) {
      const log = "loguniform" in dimension, on = v => log ? Math.log(v) : v;
      const low = Math.min(...values), high = Math.max(...values);
      return {label, top: shown(high), bottom: shown(low), text: t => shown(read(t)),
              at: t => read(t) === undefined ? null
                : high === low ? 0.5 : (on(read(t)) - on(low)) / (on(high) - on(low))};
    }
    const sorted = values.every(v => typeof v === "number") ? [...values].sort((a, b) => a - b) : values;
    const kinds = [...new Set(sorted.map(v => JSON.stringify(v)))];
    const names = kinds.map(k => plain(JSON.parse(k)));
    return {label, top: names[names.length - 1], bottom: names[0], text: t => shown(read(t)),
            at: t => read(t) === undefined ? null
              : kinds.length === 1 ? 0.5 : kinds.indexOf(JSON.stringify(read(t))) / (kinds.length - 1)};
  }

  function importance() {
    const rows = Object.entries(advice.importance).reverse();
    document.getElementById("importance").hidden = rows.length === 0;
    if (!rows.length) return;
    draw("importance", [{type: "bar", orientation: "h", x: rows.map(r => 100 * r[1]),
      y: rows.map(r => r[0].split(".").pop()), marker: {color: css("--accent")},
      hovertemplate: "%{y}: %{x:.0f} %<extra></extra>"}],
      {xaxis: {title: {text: "share of the variation, %"}}, yaxis: {}});
  }

  function progress() {
    const curve = advice.more_search.best_so_far;
    draw("progress", [{mode: "lines+markers", x: curve.map(p => p[0] / 60), y: curve.map(p => 100 * p[1]),
      line: {shape: "hv", color: css("--accent")}, marker: {size: 5, color: css("--accent")},
      name: "best trial so far", hovertemplate: "%{x:.1f} min: %{y:.1f} %<extra></extra>"},
      guessing(curve.map(p => p[0] / 60))],
      {xaxis: {title: {text: "minutes of search"}}, yaxis: {title: {text: "best accuracy so far, %"}}});
  }

  function show(id, scroll) {
    const trial = byId.get(id);
    document.getElementById("pick").value = id;
    document.getElementById("trial-title").textContent = `Trial ${id}, depth ${trial.depth}`;
    const rows = [["Status", trial.status + (trial.reason ? `: ${trial.reason}` : "")]];
    if (trial.accuracy !== undefined) rows.push(
      ["Held-out accuracy", `${share(trial.accuracy)} after ${trial.tasks_done} of ${advice.tasks.length} tasks`],
      ["Each task", trial.per_task.map(share).join(", ")],
      ["Training", `${trial.seconds.toFixed(1)} s (${trial.epochs} passes)`],
      ["Stored features", `${(trial.feature_bytes / 1e6).toFixed(1)} MB`],
      ["Serving", `${(trial.serving_macs / 1e6).toFixed(1)} million multiply-adds for each prediction, `
        + `${(trial.head_bytes / 1e6).toFixed(2)} MB of weights for each task in memory`],
      ["Checkpoint", `${(trial.checkpoint_bytes / 1e6).toFixed(2)} MB, `
        + `${(trial.bytes_per_task / 1e3).toFixed(1)} kB for each task`]);
    if (trial.test_accuracy !== null && trial.test_accuracy !== undefined)
      rows.push(["Test accuracy", share(trial.test_accuracy)]);
    for (const [key, value] of Object.entries(trial.params)) rows.push([key, JSON.stringify(value)]);
    document.getElementById("facts").replaceChildren(...rows.flatMap(([name, value]) => {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      dt.textContent = name; dd.textContent = value;
      return [dt, dd];
    }));
    document.getElementById("yaml").textContent = yaml(trial);
    if (scroll) document.getElementById("trial").scrollIntoView({block: "nearest", behavior: "smooth"});
  }

  function yaml(trial) {
    const config = structuredClone(advice.config);
    for (const [key, value] of Object.entries(advice.fixed)) set(config, key, value);
    for (const [key, value] of Object.entries(trial.params)) set(config, key, value);
    config.train.seed = trial.seed;
    if (trial.kind === "bound") config.train.strategy = "separate_heads";
    return Object.entries(config).map(([section, values]) => `${section}:\n` + Object.entries(values)
      .map(([key, value]) => `  ${key}: ${JSON.stringify(value)}`).join("\n")).join("\n");
  }

  function set(config, key, value) {
    const [section, name] = key.split(".");
    config[section][name] = value;
  }

  const pick = document.getElementById("pick");
  pick.replaceChildren(...advice.trials.map(trial => new Option(
    `${trial.id} · depth ${trial.depth} · ` + (trial.accuracy === undefined ? trial.status
      : `${share(trial.accuracy)}${trial.status === "pruned" ? " (stopped early)" : ""}`), trial.id)));
  pick.addEventListener("change", () => show(pick.value, false));
  for (const button of document.querySelectorAll("button[data-cost]")) {
    button.addEventListener("click", () => {
      cost = button.dataset.cost;
      for (const other of document.querySelectorAll("button[data-cost]"))
        other.setAttribute("aria-pressed", String(other === button));
      front();
    });
  }
  const all = () => { depths(); front(); parallel(); importance(); progress(); };
  all();
  show(advice.recommendation.trial, false);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  matchMedia("(max-width: 760px)").addEventListener("change", all);
})();
