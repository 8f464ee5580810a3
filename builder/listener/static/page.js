// Shows the rows that /status/changes sends. Texts of others go into the page as text, never as markup.
"use strict";

const STATES = ["running", "pending", "new", "failed", "foreign", "published"];
const ORDER = new Map(STATES.map((state, place) => [state, place]));
const SIZE = 100;
const QUIET = 45_000; // milliseconds without an event, after which the stream is taken for dead

const rows = new Map(); // by key
const shown = new Map(); // the <tr> of rows on this page
const filter = { state: "", model: "" };
let page = 0;
let arranged = []; // rows that match, in order
let state = { sources: [], synced: false };
let heard = Date.now();
let source = null;
let after = "";
let due = false;

const element = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

function make(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

// ---- what is sent

function connect() {
  source?.close();
  source = new EventSource("status/changes" + (after ? "?after=" + encodeURIComponent(after) : ""));
  source.addEventListener("rows", (event) => {
    const sent = JSON.parse(event.data);
    if (sent.first) rows.clear();
    for (const key of sent.removed) rows.delete(key);
    for (const row of sent.rows) {
      row.find = row.model.toLowerCase();
      rows.set(row.key, row);
    }
    element("versions").removeAttribute("aria-busy");
    told(event);
    draw();
  });
  source.addEventListener("state", (event) => {
    state = JSON.parse(event.data);
    told(event);
    drawState();
  });
  source.onerror = () => {
    connection("lost", "Not connected, trying again");
    // What was refused is not tried again by itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
  };
}

function told(event) {
  heard = Date.now();
  if (event.lastEventId) after = event.lastEventId;
  if (state.sources.some((each) => each.failing_since !== null)) connection("stale", "Connected, but not current");
  else connection("live", "Live");
}

function connection(kind, text) {
  const shownNow = element("connection");
  if (shownNow.dataset.state === kind) return;
  shownNow.dataset.state = kind;
  shownNow.textContent = text;
}

// ---- what is shown

function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    arrange();
    drawFilters();
    drawRows();
  });
}

function arrange() {
  const text = filter.model.trim().toLowerCase();
  arranged = [...rows.values()].filter(
    (row) => (!filter.state || row.state === filter.state) && (!text || row.find.includes(text)),
  );
  arranged.sort(
    (one, two) =>
      ORDER.get(one.state) - ORDER.get(two.state) ||
      (two.since ?? "").localeCompare(one.since ?? "") ||
      one.model.localeCompare(two.model) ||
      Number(two.version) - Number(one.version),
  );
  page = Math.max(0, Math.min(page, Math.ceil(arranged.length / SIZE) - 1));
}

function drawFilters() {
  const counts = new Map(STATES.map((name) => [name, 0]));
  for (const row of rows.values()) counts.set(row.state, counts.get(row.state) + 1);
  for (const button of element("states").children) {
    const name = button.dataset.state ?? "";
    const count = name ? counts.get(name) : rows.size;
    button.dataset.count = count;
    button.querySelector(".count").textContent = number.format(count);
    button.setAttribute("aria-pressed", String(name === filter.state));
  }
  say([`${number.format(rows.size)} versions`, ...STATES.map((name) => `${number.format(counts.get(name))} ${name}`)]);
}

let saying = 0;
let said = "";
// A screen reader is told of counts once they have been the same for a while.
function say(parts) {
  const text = parts.join(", ");
  if (text === said) return;
  said = text;
  clearTimeout(saying);
  saying = setTimeout(() => { element("counts").textContent = text; }, 2000);
}

function drawRows() {
  const part = arranged.slice(page * SIZE, (page + 1) * SIZE);
  const focused = document.activeElement;
  const body = element("rows");
  const keys = new Set(part.map((row) => row.key));
  for (const [key, { line }] of shown) {
    if (!keys.has(key)) {
      line.remove();
      shown.delete(key);
    }
  }
  let place = body.firstElementChild;
  for (const row of part) {
    const known = shown.get(row.key);
    if (known?.row !== row) {
      const line = lineOf(row, known?.line);
      if (known) {
        if (place === known.line) place = line;
        known.line.replaceWith(line);
      }
      shown.set(row.key, { row, line });
    }
    const { line } = shown.get(row.key);
    if (place === line) place = line.nextElementSibling;
    else body.insertBefore(line, place);
  }
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  drawRange(part.length);
  fit();
}

function drawRange(count) {
  const pages = Math.max(1, Math.ceil(arranged.length / SIZE));
  element("pages").dataset.pages = pages;
  element("previous").disabled = page === 0;
  element("next").disabled = page >= pages - 1;
  const first = page * SIZE;
  const all = number.format(arranged.length);
  element("range").textContent = pages === 1
    ? `${all} ${arranged.length === 1 ? "version" : "versions"}`
    : `${number.format(first + 1)} to ${number.format(first + count)} of ${all} versions`;
  const nothing = element("nothing");
  nothing.hidden = count > 0;
  element("versions").hidden = count === 0;
  if (count) return;
  if (rows.size) nothing.textContent = "No version matches the filter.";
  else if (!state.synced) nothing.textContent = "The versions have not been listed yet.";
  else nothing.textContent = "No version carries the target's tag.";
}

function lineOf(row, before) {
  const cell = (className, label, ...children) => {
    const made = make("td", { className }, ...children);
    if (!made.childNodes.length) made.classList.add("empty");
    made.dataset.label = label;
    made.setAttribute("role", "cell");
    return made;
  };
  const mark = make("span", { className: "mark" }, row.state);
  mark.dataset.state = row.state;
  const name = make("span", { className: "name", title: row.model }, link(row.link, row.model));
  const model = make("th", { className: "model", scope: "row" }, name);
  model.setAttribute("role", "rowheader");
  const line = make(
    "tr", {},
    cell("state", "State", mark),
    model,
    cell("number", "Version", row.version),
    cell("when", "Since", row.since ? time(row.since) : ""),
    cell("result", row.error && !row.digest ? "Error" : "Image", imageOf(row), whyOf(row, before)),
    cell("method", "Method", methodOf(row)),
    cell("attempts", "Attempts", attemptsOf(row)),
  );
  line.setAttribute("role", "row");
  return line;
}

function imageOf(row) {
  if (!row.digest && !row.platforms) return "";
  const made = make("div", { className: "image" });
  if (row.digest) {
    const short = make("span", { className: "code", title: row.image || row.digest }, row.digest.slice(0, 19) + "…");
    const copy = make("button", { type: "button", className: "copy" }, "Copy");
    copy.dataset.text = row.image || row.digest;
    copy.setAttribute("aria-label", `Copy the digest reference of ${row.model} version ${row.version}`);
    made.append(make("div", { className: "line" }, short, copy));
  }
  if (row.platforms) made.append(make("span", { className: "small" }, row.platforms.join(", ")));
  return made;
}

function methodOf(row) {
  if (!row.method && !row.job && !row.log) return "";
  const job = row.job ? make("span", { className: "small code job", title: row.job }, row.job) : null;
  const log = row.log ? make("span", { className: "small" }, link(row.log, "Log")) : null;
  return make("div", {}, row.method ?? "", job, log);
}

function attemptsOf(row) {
  if (!row.attempts && !row.next) return "";
  const next = row.next ? make("span", { className: "small" }, ...nextTry(row.next)) : null;
  return make("div", {}, row.attempts ? String(row.attempts) : "", next);
}

function nextTry(text) {
  if (Number.isNaN(Date.parse(text))) return ["by hand: ", make("span", { className: "code" }, text)];
  return Date.parse(text) > Date.now() ? ["next ", time(text)] : ["next is due"];
}

function whyOf(row, before) {
  if (!row.error) return "";
  const made = make("div", { className: "why" }, make("p", {}, row.error));
  const more = make("button", { type: "button", className: "more" });
  made.append(more);
  expand(made, more, Boolean(before?.querySelector(".why.open")));
  return made;
}

// A text that is there as a whole needs no button for more of it.
function fit() {
  for (const why of element("rows").querySelectorAll(".why:not(.open)")) {
    const [text, more] = why.children;
    more.hidden = text.scrollHeight <= text.clientHeight + 1;
  }
}

function expand(why, button, open) {
  why.classList.toggle("open", open);
  button.textContent = open ? "Less" : "More";
  button.setAttribute("aria-expanded", String(open));
}

function link(address, text) {
  if (!/^https?:\/\//i.test(address ?? "")) return text;
  return make("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, text);
}

// ---- times

const UNITS = [["day", 86_400], ["hour", 3600], ["minute", 60]];
const words = new Intl.RelativeTimeFormat("en", { numeric: "always", style: "short" });

function relative(moment) {
  const seconds = (Date.parse(moment) - Date.now()) / 1000;
  if (Number.isNaN(seconds)) return "";
  for (const [unit, size] of UNITS) {
    if (Math.abs(seconds) >= size) return words.format(Math.trunc(seconds / size), unit);
  }
  return seconds > 0 ? "in less than a minute" : "just now";
}

function time(moment) {
  return make("time", { dateTime: moment, title: new Date(moment).toLocaleString() }, relative(moment));
}

// ---- what does not answer

function drawState() {
  element("target").textContent = state.target ? `target ${state.target}` : "";
  const failing = state.sources.filter((each) => each.failing_since !== null);
  const before = element("problems").dataset.shown ?? "";
  const now = JSON.stringify(failing);
  if (now !== before) {
    element("problems").dataset.shown = now;
    element("problems").replaceChildren(
      ...failing.map((each) => {
        const since = new Date(each.failing_since * 1000);
        return make(
          "p", { className: "problem" },
          make("strong", {}, `${each.name} does not answer`),
          " since ", make("span", {}, since.toLocaleTimeString()), ", ", time(since.toISOString()),
          ". What is shown is from before.",
          make("span", { className: "said" }, each.error),
        );
      }),
    );
  }
  if (!rows.size) draw();
}

// ---- what people do

function remember() {
  const chosen = new URLSearchParams(Object.entries(filter).filter(([, value]) => value));
  history.replaceState(null, "", chosen.size ? `#${chosen}` : location.pathname + location.search);
}

function choose(changes) {
  Object.assign(filter, changes);
  page = 0;
  remember();
  draw();
}

function turn(pages) {
  page += pages;
  draw();
  element("versions").scrollIntoView({ block: "start" });
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.text);
  } catch {
    // Without HTTPS there is no clipboard but this one.
    const area = make("textarea", { value: button.dataset.text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

function begin() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  filter.model = chosen.get("model") ?? "";
  filter.state = STATES.includes(chosen.get("state")) ? chosen.get("state") : "";
  element("model").value = filter.model;
  for (const name of ["", ...STATES]) {
    const button = make("button", { type: "button" }, make("span", {}, name || "all"), make("span", { className: "count" }, "0"));
    if (name) button.dataset.state = name;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => choose({ state: filter.state === name ? "" : name }));
    element("states").append(button);
  }
  element("model").addEventListener("input", (event) => choose({ model: event.target.value }));
  element("filters").addEventListener("submit", (event) => event.preventDefault());
  element("previous").addEventListener("click", () => turn(-1));
  element("next").addEventListener("click", () => turn(1));
  element("rows").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.className === "copy") copy(button);
    if (button?.className === "more") expand(button.parentElement, button, button.textContent === "More");
  });
  window.addEventListener("resize", fit);
  setInterval(() => {
    for (const each of document.querySelectorAll("time")) each.textContent = relative(each.dateTime);
    if (Date.now() - heard > QUIET) connect();
  }, 15_000);
  connect();
}

begin();
