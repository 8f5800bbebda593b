// One column of the page: plays frames at a pace, draws them, and shows their figures.

import { tokensPerPass } from "./trace.js";

/** `announce` gets the text of each block once it is committed. */
export class Column {
  constructor(section, announce = () => {}) {
    this.parts = {};
    for (const part of section.querySelectorAll("[data-part]")) {
      this.parts[part.dataset.part] = part;
    }
    this.announce = announce;
    this.reset("", 0, []);
  }

  /**
   * Empties the column. `pace` is the least time of a frame in milliseconds. Pass by pass, the
   * first frame waits until each column of `together` has one: they are there to be compared, and
   * the service sends ar in longer pieces.
   */
  reset(prompt, pace, together) {
    this.together = together;
    this.stopClocks();
    this.shownAt = performance.now();
    this.queue = [];
    this.draft = null;
    this.shown = null;
    this.pace = pace;
    this.ended = new Promise((resolve) => {
      this.resolve = resolve;
    });
    const { parts } = this;
    parts.prompt.textContent = prompt;
    parts.text.textContent = "";
    parts.block.replaceChildren();
    parts.progress.textContent = "";
    for (const name of ["per-pass", "rate", "passes"]) parts[name].textContent = "–";
  }

  /** Shows the frame of a draft, if nothing newer comes before its turn. */
  offer(frame) {
    this.draft = frame;
    this.playAll();
  }

  /** Shows these frames in turn, but for steps that have been seen as drafts. */
  add(frames) {
    this.draft = null;
    const { shown } = this;
    const seen = (frame) => frame.block === shown?.block && frame.step <= shown.step;
    this.queue.push(...frames.filter((frame) => frame.closes || frame.ends || !seen(frame)));
    this.playAll();
  }

  /** Drops what waits and shows `frame`. */
  finish(frame) {
    this.queue = [];
    this.draft = null;
    this.stopClocks();
    this.show(frame);
    this.resolve();
    this.playAll();
  }

  /** Plays this column, and those that may have waited for its first frame. */
  playAll() {
    this.play();
    for (const other of this.together) if (other.shown === null) other.play();
  }

  isEmpty() {
    return this.shown === null && this.draft === null && this.queue.length === 0;
  }

  /** Shows what waits, unless a frame has its time. */
  play() {
    if (this.timer !== null) return;
    if (this.pace > 0 && this.together.some((other) => other.isEmpty())) return;
    const frame = this.next();
    if (!frame) return;
    this.show(frame);
    if (frame.ends) this.resolve();
    this.timer = setTimeout(() => {
      this.timer = null;
      this.play();
    }, Math.max(this.pace, 16));
  }

  /** The next frame whose time has come; in real time the newest of those that wait. */
  next() {
    clearTimeout(this.due);
    if (this.pace === 0) {
      while (this.queue.length > 1) this.tell(this.queue.shift());
    }
    const frame = this.queue.shift() ?? this.draft;
    if (!frame) return null;
    // A draft may be passes ahead. It takes their time, in which the block with all of them may come.
    const wait = frame === this.draft ? this.untilDue(frame) : 0;
    if (wait > 0) {
      this.due = setTimeout(() => this.play(), wait);
      return null;
    }
    this.draft = null;
    return frame;
  }

  /** Milliseconds until as many passes as a draft is ahead have had their time. */
  untilDue(draft) {
    const passes = draft.nfe - (this.shown?.nfe ?? 0);
    return passes > 1 ? this.shownAt + this.pace * passes - performance.now() : 0;
  }

  stopClocks() {
    clearTimeout(this.timer);
    clearTimeout(this.due);
    this.timer = null;
  }

  show(frame) {
    this.shown = frame;
    this.shownAt = performance.now();
    this.draw(frame);
    this.tell(frame);
    this.follow();
  }

  /** Scrolls to the end of the text. */
  follow() {
    const { output } = this.parts;
    output.scrollTop = output.scrollHeight;
  }

  tell(frame) {
    if (frame.closes) this.announce(frame.text);
  }

  /** Draws a frame and its figures. */
  draw(frame) {
    const { parts } = this;
    parts.text.textContent = frame.before;
    parts.block.replaceChildren(...frame.cells.flatMap((cell) => drawn(cell, frame)));
    parts.progress.textContent = place(frame);
    const perPass = tokensPerPass(frame);
    parts["per-pass"].textContent = perPass === null ? "–" : perPass.toFixed(2);
    parts.rate.textContent = frame.rate === null ? "–" : frame.rate.toFixed(frame.rate < 10 ? 1 : 0);
    parts.passes.textContent = frame.ar ? `${frame.context}` : `${frame.nfe} + ${frame.context}`;
  }
}

/** Where a frame stands, in words. */
export function place(frame) {
  if (frame.ends) return `${frame.tokens} tokens`;
  // While it is all masks the context tower reads what stands before it.
  if (frame.step < 0) return `block ${frame.block + 1}, masks`;
  if (frame.ar) return `token ${frame.tokens}`;
  const steps = frame.steps === null ? "" : ` of ${frame.steps}`;
  return `block ${frame.block + 1}, step ${frame.step + 1}${steps}`;
}

/** Nodes of a cell. A committed line break breaks the line, one that is a guess only shows. */
function drawn(cell, frame) {
  if (frame.ar) return [plain(cell, cell === frame.cells[frame.cells.length - 1])];
  if (cell.step === null) return [masked(cell)];
  const lines = cell.text.split("\n");
  return lines.flatMap((line, index) => {
    const isLast = index === lines.length - 1;
    if (isLast && line === "" && lines.length > 1) return [];
    const box = element("cell done", isLast ? line : `${line}\u21b5`);
    box.style.setProperty("--at", cell.step / Math.max(1, (frame.steps ?? 16) - 1));
    if (index === 0) box.dataset.step = cell.step + 1;
    if (cell.step === frame.step) box.classList.add("new");
    return isLast ? [box] : [box, document.createTextNode("\n")];
  });
}

function masked(cell) {
  if (cell.text === null) return element("cell mask", "");
  const box = element("cell guess", cell.text.replaceAll("\n", "\u21b5"));
  box.style.setProperty("--sure", cell.confidence);
  return box;
}

function plain(cell, isNewest) {
  return element(isNewest ? "newest" : "", cell.text);
}

function element(name, text) {
  const made = document.createElement("span");
  made.className = name;
  // A box of blanks alone would have no baseline to stand on.
  made.textContent = text.trim() === "" ? `${text}\u200b` : text;
  return made;
}
