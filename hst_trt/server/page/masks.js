// Which tokens the large model computed at a step, and the overlay that shows it: dark where the small model drew alone.

const VEIL = "rgb(10 12 18 / 0.7)";
const EDGE = "rgb(255 255 255 / 0.9)";

/**
 * The tokens the large model computed at each step, as arrays of booleans, row by row: the bits of the answer where a step has
 * a mask, else all of them or none.
 */
export function masksOfSteps({ plan, masks, stats }) {
  const given = new Map(masks.map(({ step, images }) => [step, bitsOf(images[0], stats.num_tokens)]));
  return plan.map((step, t) => given.get(t) ?? new Array(stats.num_tokens).fill(step.large_tokens > 0));
}

/** The first `count` bits of base64, most significant first. */
export function bitsOf(base64, count) {
  const bytes = atob(base64);
  return Array.from({ length: count }, (_, i) => ((bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1) === 1);
}

/** Paints a mask over a picture: `canvas` has the picture's size in pixels, which `columns` tokens of `mask` share a row of. */
export function paintMask(canvas, mask, columns) {
  const context = canvas.getContext("2d");
  const side = canvas.width / columns;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const worked = (row, column) => column < 0 || column >= columns || (mask[row * columns + column] ?? true);
  mask.forEach((large, i) => {
    if (large) return;
    const [row, column] = [Math.floor(i / columns), i % columns];
    const [x, y] = [column * side, row * side];
    context.fillStyle = VEIL;
    context.fillRect(x, y, side, side);
    context.fillStyle = EDGE; // so that the border also shows on a dark picture
    if (column > 0 && worked(row, column - 1)) context.fillRect(x, y, 1, side);
    if (column < columns - 1 && worked(row, column + 1)) context.fillRect(x + side - 1, y, 1, side);
    if (row > 0 && worked(row - 1, column)) context.fillRect(x, y, side, 1);
    if ((row + 1) * columns < mask.length && worked(row + 1, column)) context.fillRect(x, y + side - 1, side, 1);
  });
}
