// Sorting, filtering, the theme, labels of marks, and saving the records.  The page is whole without it.
"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  byId("theme").addEventListener("click", () => {
    const shown = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = shown === "dark" ? "light" : "dark";
  });

  byId("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([byId("records").textContent], { type: "application/json" }));
    link.download = "w8a8-records.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // numbers by their value, texts by the natural order of the digits in them; what was not measured is last both ways
  const valueOf = (cell) => (cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v));
  const order = new Intl.Collator("en", { numeric: true });
  const sort = (table, column, sign) => {
    const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column]), row]);
    const missing = (value) => value === "–";
    rows.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return sign * (typeof a === "number" ? a - b : order.compare(a, b));
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  const table = byId("layers");
  if (table) {
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const next = head.ariaSort === "ascending" ? "descending" : "ascending";
        for (const other of head.parentElement.cells) other.ariaSort = "none";
        head.ariaSort = next;
        sort(table, Number(button.dataset.column), next === "ascending" ? 1 : -1);
      });
    }
    const name = byId("filter-name");
    const kind = byId("filter-kind");
    const filter = () => {
      const wanted = name.value.trim().toLowerCase();
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const named = row.cells[0].textContent.toLowerCase().includes(wanted);
        row.hidden = !(named && (kind.value === "" || row.cells[1].textContent === kind.value));
        shown += row.hidden ? 0 : 1;
      }
      byId("shown").textContent = `${shown} of ${table.tBodies[0].rows.length} layers`;
    };
    name.addEventListener("input", filter);
    kind.addEventListener("change", filter);
    name.form.addEventListener("submit", (event) => event.preventDefault());
    name.form.addEventListener("reset", () => setTimeout(filter));
  }

  const tip = byId("tip");
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest("figure svg [aria-label][role=graphics-symbol]:not([aria-roledescription=axis])");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 12)}px`;
  });
})();
