// Numbers as people read them, and the one figure that the page computes itself.

export function seconds(value) {
  if (value >= 100) return `${Math.round(value)} s`;
  if (value >= 1) return `${value.toFixed(value >= 10 ? 1 : 2)} s`;
  return `${Math.round(1000 * value)} ms`;
}

export const times = (value) => `${value.toFixed(2)}×`;
export const percent = (value) => `${Math.round(100 * value)} %`;

/** From the encoded prompt to the decoded picture, without waiting in the queue. */
export const drawingSeconds = (run) => Object.values(run.answer.stats.seconds).reduce((sum, part) => sum + part, 0);
export const loopSeconds = (run) => run.answer.stats.seconds.denoise;

/** Peak signal-to-noise ratio in dB of two loaded images of the same size; Infinity if they are equal. */
export function psnr(one, other) {
  const [a, b] = [pixelsOf(one), pixelsOf(other)];
  let sum = 0;
  for (let i = 0; i < a.length; i += 4) for (let c = 0; c < 3; c++) sum += (a[i + c] - b[i + c]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / ((a.length / 4) * 3)));
}

function pixelsOf(image) {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}
