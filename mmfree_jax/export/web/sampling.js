// The choice of a token, in the order of `mmfree generate`: temperature, then top-k.

/** Random numbers in [0, 1) from a 32-bit seed (mulberry32). */
export function randomNumbers(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = a;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The likeliest token; of equals the first. */
export function argmax(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/**
 * A token drawn from softmax(logits / temperature), among the topK likeliest.
 *
 * @param {Float32Array} logits one for each token.
 * @param {{temperature: number, topK: number}} options temperature 0 is greedy, topK 0 is all.
 * @param {() => number} random numbers in [0, 1).
 */
export function chooseToken(logits, { temperature, topK }, random) {
  if (temperature === 0) return argmax(logits);
  let least = -Infinity;
  if (topK > 0 && topK < logits.length) {
    least = Float32Array.from(logits).sort()[logits.length - topK];
  }
  const highest = logits[argmax(logits)];
  const weights = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < logits.length; i++) {
    if (logits[i] >= least) total += weights[i] = Math.exp((logits[i] - highest) / temperature);
  }
  let rest = random() * total;
  let chosen = 0;
  for (let i = 0; i < weights.length; i++) {
    if (weights[i] === 0) continue;
    chosen = i;
    rest -= weights[i];
    if (rest < 0) break;
  }
  return chosen;
}
