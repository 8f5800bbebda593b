// From the events of a stream to frames: what there is to see after each pass of the model.

/**
 * A frame: `before` is the text of earlier blocks, `cells` is the block after step `step` of
 * `steps` (null while that is not known; step -1 is before the first), and the figures are those up to this pass. `closes` marks
 * a block's last frame, and `text` is then what the block adds.
 *
 * A cell: `text` (null where nothing is known), `confidence`, and `step` that committed it, null
 * where it is still masked.
 */

// Modes in which the context tower gives the tokens, or checks them.
const CHECKED = ["ar", "verified", "auto"];
const MASK = { text: null, confidence: 0, step: null };

/** What a stream has said so far, and all frames of its finished blocks. */
export class Trace {
  /** `clock` gives seconds. Figures of `ar` count passes of the context tower. */
  constructor(mode, clock) {
    this.mode = mode;
    this.frames = [];
    this.text = "";
    this.blocks = 0;
    this.total = { tokens: 0, nfe: 0, context: 0, rate: null };
    this.clock = clock;
    this.started = clock();
    this.drafts = [];
  }

  /** The frame of a draft that is on its way. */
  draft(draft) {
    this.drafts.push(draft);
    const cells = draft.token_ids.map((_, place) => draftCell(this.drafts, draft, place));
    return this.frame(cells, draft.step, null, this.total.nfe + draft.step + 1);
  }

  /** All frames of a block that is committed, whichever of its drafts have come. */
  block(block, text) {
    const { total } = this;
    const steps = Math.max(block.nfe, 1 + Math.max(0, ...block.commit_steps));
    const tokens = total.tokens + block.token_ids.length;
    const rate = tokens / Math.max(this.clock() - this.started, 1e-3);
    const added = this.mode === "mask_diffusion" ? [this.masks(block)] : [];
    for (let step = 0; step < steps; step += 1) {
      const cells = cellsOf(block, this.drafts, step, step === steps - 1);
      const shown = this.mode === "ar" ? cells.filter((cell) => cell.step !== null) : cells;
      const frame = this.frame(shown, step, steps, total.nfe + Math.min(step + 1, block.nfe));
      // The first token of ar comes with the prompt's own pass.
      if (block.nfe === 0) frame.context += Math.max(0, step + 1 - steps + block.context_passes);
      added.push({ ...frame, rate });
    }
    this.total = {
      tokens,
      nfe: total.nfe + block.nfe,
      context: total.context + block.context_passes,
      rate,
    };
    const last = added[added.length - 1];
    Object.assign(last, { closes: true, text, context: this.total.context });
    this.text += text;
    this.blocks += 1;
    this.drafts = [];
    this.frames.push(...added);
    return added;
  }

  /** The last frame: all text, with the figures that the service gives. */
  end(usage) {
    if (usage) {
      const { nfe, context_passes: context } = usage.twotower;
      this.total = { ...this.total, tokens: usage.completion_tokens, nfe, context };
    }
    const frame = { ...this.frame([], 0, null, this.total.nfe), ends: true };
    this.frames.push(frame);
    return frame;
  }

  /** The frame before a block's first step. In verified nobody says how much was drafted. */
  masks(block) {
    const cells = (this.drafts[0] ?? block).token_ids.map(() => MASK);
    return this.frame(cells, -1, null, this.total.nfe);
  }

  frame(cells, step, steps, nfe) {
    const { tokens, context, rate } = this.total;
    const committed = cells.filter((cell) => cell.step !== null).length;
    const figures = { tokens: tokens + committed, nfe, context, rate };
    const { text: before, blocks: block } = this;
    const kind = { ar: this.mode === "ar", checked: CHECKED.includes(this.mode) };
    const state = { ...kind, closes: false, ends: false, text: "" };
    return { block, step, steps, before, cells, ...figures, ...state };
  }
}

/** Tokens of a frame for each pass of the towers that they wait for; null before the first pass. */
export function tokensPerPass(frame) {
  const passes = frame.checked ? frame.nfe + frame.context : frame.nfe;
  return passes === 0 ? null : frame.tokens / passes;
}

/** Cells of a block after a step. The last step has the block alone: its drafts may be longer. */
function cellsOf(block, drafts, step, isLast) {
  const draft = drafts.findLast((each) => each.step <= step);
  const length = block.token_ids.length;
  const places = isLast || !draft ? length : Math.max(length, draft.token_ids.length);
  return Array.from({ length: places }, (_, place) => {
    if (place < length && block.commit_steps[place] <= step) {
      return {
        text: tokenText(block, place),
        confidence: block.confidences[place],
        step: block.commit_steps[place],
      };
    }
    if (!draft) return MASK;
    const cell = draftCell(drafts, draft, place);
    return place < length ? { ...cell, step: null } : cell;
  });
}

function draftCell(drafts, draft, place) {
  const first = drafts.find((each) => !each.masked[place]);
  const step = draft.masked[place] ? null : (first ?? draft).step;
  return { text: tokenText(draft, place), confidence: draft.confidences[place] ?? 0, step };
}

/** A token's text; its id where the service has no tokenizer; null where nothing is known. */
function tokenText(source, place) {
  return source.tokens[place]?.replace(/^token_id:(?=\d+$)/, " ") ?? null;
}
