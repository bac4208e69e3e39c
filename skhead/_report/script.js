"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const tellTheme = () => theme.setAttribute("aria-pressed", String(dark()));
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    tellTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tellTheme);
  tellTheme();

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return a - b;
  };
  const sortBy = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row) => [valueOf(row, column), row]);
    rows.sort((a, b) => {
      const undefinedLast = Number.isNaN(a[0]) || Number.isNaN(b[0]);
      return descending && !undefinedLast ? compare(b[0], a[0]) : compare(a[0], b[0]);
    });
    body.append(...rows.map((entry) => entry[1]));
  };
  for (const table of all("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const now = head.getAttribute("aria-sort");
        const descending = now === null ? numeric : now === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(table, column, descending);
      });
    });
  }

  for (const box of all("input[data-filter]")) {
    const table = document.getElementById(box.dataset.filter);
    const count = document.getElementById(box.dataset.count);
    const split = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = Array.from(table.tBodies[0].rows);
    box.addEventListener("input", () => {
      const words = split(box.value);
      let shown = 0;
      for (const row of rows) {
        const present = Array.from(row.cells).flatMap((cell) => split(cell.textContent));
        row.hidden = !words.every((word) => present.some((other) => other.startsWith(word)));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = `${shown} of ${rows.length}`;
    });
  }

  const openOperation = () => {
    const part = document.getElementById(location.hash.slice(1));
    if (part && part.matches("details.operation")) part.open = true;
  };
  addEventListener("hashchange", openOperation);
  openOperation();

  const cards = all("details.card");
  const openCard = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { return false; }
    const card = cards.find((entry) => entry.id === name);
    if (!card) return false;
    card.hidden = false;
    card.open = true;
    card.scrollIntoView();
    card.querySelector("summary").focus({ preventScroll: true });
    return true;
  };
  if (cards.length) {
    addEventListener("hashchange", openCard);
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a[href^='#']");
      if (link && link.getAttribute("href") === location.hash && openCard()) event.preventDefault();
    });
    const list = document.getElementById("card-list");
    const filter = document.getElementById("card-filter");
    const count = document.getElementById("card-count");
    const layers = all("h3", list);
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const card of cards) {
        const text = card.querySelector("summary").textContent.toLowerCase();
        card.hidden = !words.every((word) => text.includes(word));
      }
      count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length}`;
      for (const layer of layers) {
        let next = layer.nextElementSibling;
        while (next && next.hidden && next.matches(".card")) next = next.nextElementSibling;
        layer.hidden = !next || !next.matches(".card");
      }
    });
    const toggle = document.getElementById("card-toggle");
    toggle.addEventListener("click", () => {
      const opening = toggle.textContent === "Open all";
      for (const card of cards) if (!card.hidden) card.open = opening;
      toggle.textContent = opening ? "Close all" : "Open all";
    });
    openCard();
    addEventListener("load", () => requestAnimationFrame(openCard));
  }

  const wiring = document.getElementById("wiring");
  if (wiring) {
    const edges = all(".edge", wiring);
    const nodes = all(".node", wiring);
    const panel = document.getElementById("details");
    const hint = panel.cloneNode(true);
    const shown = (kind) => document.getElementById(`show-${kind}`).checked;
    const only = document.getElementById("only-standing");
    const drawn = (edge) => shown(edge.dataset.pair) && !edge.classList.contains("out");
    const clear = () => {
      wiring.classList.remove("picked");
      for (const part of [...edges, ...nodes]) part.classList.remove("lit");
      panel.replaceChildren(...hint.cloneNode(true).childNodes);
    };
    const write = (title, line, items) => {
      const heading = document.createElement("p");
      const strong = document.createElement("strong");
      strong.textContent = title;
      heading.append(strong, line ? ` ${line}` : "");
      const list = document.createElement("ul");
      for (const item of items) {
        const entry = document.createElement("li");
        entry.textContent = item;
        list.append(entry);
      }
      panel.replaceChildren(heading, list);
    };
    const light = (chosen) => {
      wiring.classList.add("picked");
      const ends = new Set();
      for (const edge of edges) {
        const on = chosen(edge) && drawn(edge);
        edge.classList.toggle("lit", on);
        if (on) ends.add(edge.dataset.source).add(edge.dataset.target);
      }
      for (const node of nodes) node.classList.toggle("lit", ends.has(node.dataset.head));
    };
    const pickNode = (node) => {
      const head = node.dataset.head;
      light((edge) => edge.dataset.source === head || edge.dataset.target === head);
      for (const other of nodes) if (other.dataset.head === head) other.classList.add("lit");
      const details = JSON.parse(node.dataset.details);
      write(head, details.head, details.edges.filter((text) =>
        shown(text.slice(0, 2)) && !(only && only.checked && !text.endsWith("stands out"))));
    };
    const pickEdge = (edge) => {
      light((other) => other === edge);
      write(edge.querySelector("title").textContent, "", []);
    };
    const restore = () => {
      const focused = document.activeElement.closest(".node");
      if (focused) pickNode(focused); else clear();
    };
    for (const node of nodes) {
      node.addEventListener("pointerenter", () => pickNode(node));
      node.addEventListener("pointerleave", restore);
      node.addEventListener("focus", () => pickNode(node));
      node.addEventListener("blur", clear);
    }
    for (const edge of edges) {
      edge.addEventListener("pointerenter", () => pickEdge(edge));
      edge.addEventListener("pointerleave", restore);
    }
    wiring.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && document.activeElement.closest(".node")) document.activeElement.blur();
    });
    if (only) {
      only.addEventListener("change", () => {
        for (const edge of edges) {
          edge.classList.toggle("out", only.checked && !edge.classList.contains("standing"));
        }
      });
    }
    for (const box of all("input[data-kind]")) {
      box.addEventListener("change", () => {
        for (const edge of edges) {
          if (edge.dataset.pair === box.dataset.kind) edge.classList.toggle("off", !box.checked);
        }
      });
    }
  }

  const printed = (value) => {
    const digits = value === 0 ? 1 : Math.max(0, 3 - Math.floor(Math.log10(Math.abs(value))));
    return value.toFixed(Math.min(digits, 5)).replace("-", "\u2212");
  };
  for (const figure of all("figure[data-values]")) {
    const map = JSON.parse(figure.dataset.values);
    const bytes = Uint8Array.from(atob(map.steps), (letter) => letter.charCodeAt(0));
    const steps = new Uint16Array(bytes.buffer);
    const names = JSON.parse(figure.dataset.names);
    const nameOf = (row, column) =>
      names.columns ? `${names.rows[row]} \u2192 ${names.columns[column]}` : names.rows[row * map.width + column];
    const picture = figure.querySelector("image");
    const readout = figure.querySelector(".readout");
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const height = steps.length / map.width;
      const column = Math.min(map.width - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * map.width)));
      const row = Math.min(height - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * height)));
      const step = steps[row * map.width + column];
      const name = nameOf(row, column);
      const value = step === 65535 ? "undefined" : printed(map.low + step / 65534 * (map.high - map.low));
      readout.textContent = name ? `${name}: ${value}` : "\u00a0";
    });
    picture.addEventListener("pointerleave", () => { readout.textContent = "\u00a0"; });
  }

  root.dataset.ready = "true";
})();
