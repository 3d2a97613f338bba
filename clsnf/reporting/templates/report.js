"use strict";
// Draws charts when they come near, sorts and filters tables, shows one product at a time on the
// screen and all of them on paper.
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  // ---- charts ----

  // Names of colours in charts, such as "@1", stand for the page's colours, which follow a light or
  // dark screen and paper (see chart_style.py).
  const NAMES = { "@1": "--c1", "@2": "--c2", "@3": "--c3", "@4": "--c4", "@5": "--c5", "@ink": "--ink", "@muted": "--muted", "@shade": "--shade" };
  const painted = (value, style, key) => {
    if (Array.isArray(value)) return value.map((v) => painted(v, style, key));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, style, k)]));
    if (key !== "color" && key !== "fillcolor") return value;
    return value === "@clear" ? "rgba(0,0,0,0)" : NAMES[value] ? style.getPropertyValue(NAMES[value]).trim() : value;
  };
  const PAPER = 455; // width of half a printed page in pixels: charts do not adapt to it themselves
  const axis = (given, style) => ({
    automargin: true, zeroline: false, gridcolor: style.getPropertyValue("--line").trim(), linecolor: style.getPropertyValue("--line").trim(),
    ...given,
  });
  const draw = (plot) => {
    const printing = root.classList.contains("printing");
    const height = Math.round(Number(plot.dataset.height) * (printing ? 0.8 : 1));
    plot.style.height = height + "px";
    const style = getComputedStyle(root);
    const figure = painted(JSON.parse(plot.parentElement.querySelector("script.spec").textContent), style);
    const layout = {
      font: { family: "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif", size: 12, color: style.getPropertyValue("--ink").trim() },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 16, t: 28, b: 44 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "closest",
      ...figure.layout, xaxis: axis(figure.layout.xaxis, style), yaxis: axis(figure.layout.yaxis, style),
      height, autosize: !printing, ...(printing ? { width: PAPER } : {}),
    };
    Plotly.react(plot, figure.data, layout, { displayModeBar: false, responsive: true });
    plot.dataset.drawn = "yes";
  };
  const plots = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || entry.target.dataset.drawn) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "400px" });
  plots.forEach((plot) => near.observe(plot));
  const again = () => plots.filter((plot) => plot.dataset.drawn).forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    const hidden = [...document.querySelectorAll("article.product:not(.shown)")];
    hidden.forEach((article) => article.classList.add("shown", "for-print"));
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    document.querySelectorAll(".for-print").forEach((article) => article.classList.remove("shown", "for-print"));
    again();
  });

  // ---- one product at a time ----

  const picker = document.getElementById("product");
  const articles = [...document.querySelectorAll("article.product")];
  const show = (article) => {
    if (!article) return;
    articles.forEach((other) => other.classList.toggle("shown", other === article));
    picker.value = article.id;
  };
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const article = target && target.closest("article.product");
    if (article) { show(article); target.scrollIntoView(); }
  };
  if (picker) {
    show(articles[0]);
    picker.addEventListener("change", () => { show(document.getElementById(picker.value)); });
    addEventListener("hashchange", follow);
    follow();
  }

  // ---- tables ----

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (!("v" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : falling ? compare(b, a) : compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row)); // rows without a number stay at the end
    }));
  }
  for (const tools of document.querySelectorAll(".tools")) {
    const table = tools.parentElement.querySelector("table.sortable");
    const find = tools.querySelector(".find");
    if (!table || !find) continue;
    const picks = [...tools.querySelectorAll(".pick")];
    const chips = [...tools.querySelectorAll(".chip")];
    const filter = () => {
      const words = find.value.trim().toLowerCase();
      const on = chips.find((chip) => chip.classList.contains("on"));
      let count = 0;
      for (const row of table.tBodies[0].rows) {
        const fits = (!words || row.textContent.toLowerCase().includes(words))
          && picks.every((pick) => !pick.value || row.cells[Number(pick.dataset.column)].textContent.trim() === pick.value)
          && (!on || !on.dataset.decision || row.dataset.decision === on.dataset.decision);
        row.hidden = !fits;
        count += fits;
      }
      tools.querySelector(".count").textContent = count + (count === 1 ? " row" : " rows");
    };
    find.addEventListener("input", filter);
    picks.forEach((pick) => pick.addEventListener("change", filter));
    chips.forEach((chip) => chip.addEventListener("click", () => {
      chips.forEach((other) => other.classList.toggle("on", other === chip));
      filter();
    }));
  }
  root.dataset.ready = "yes";
})();
