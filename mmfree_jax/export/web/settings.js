// The settings of generation: numbers that are checked before they are used.

const panel = document.getElementById("settings");
const fields = [...panel.querySelectorAll("input")];

/** What is wrong with a field, in words that name the way out; empty where nothing is. */
function fault(field) {
  const { min, max } = field;
  const whole = field.step === "1";
  const value = field.valueAsNumber;
  const inside = value >= Number(min) && (max === "" || value <= Number(max));
  if (inside && (!whole || Number.isInteger(value))) return "";
  const shown = field.validity.badInput || field.value === "" ? "is no number" : `is ${field.value}`;
  const range = max === "" ? `, ${min} or more` : ` from ${min} to ${max}`;
  return `${field.dataset.name} ${shown}: set a ${whole ? "whole " : ""}number${range}`;
}

/** Shows under a field what is wrong with it, or takes that away. */
function mark(field) {
  const text = fault(field);
  const note = document.getElementById(`${field.id}-fault`);
  note.textContent = text;
  note.hidden = text === "";
  if (text) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
  return text;
}

/** The settings by their fields' ids; null if one is wrong, which is shown and given the focus. */
export function readSettings() {
  const wrong = fields.filter(mark);
  if (wrong.length > 0) {
    panel.open = true;
    wrong[0].focus();
    document.getElementById(`${wrong[0].id}-fault`).scrollIntoView({ block: "nearest" });
    return null;
  }
  return Object.fromEntries(fields.map((field) => [field.id, field.valueAsNumber]));
}

/** What the fields hold, right or wrong. */
export function typedSettings() {
  return Object.fromEntries(fields.map((field) => [field.id, field.value]));
}

/** Fills the fields with what `typedSettings` gave. */
export function fillSettings(values) {
  for (const field of fields) {
    if (typeof values?.[field.id] === "string") field.value = values[field.id];
  }
}

for (const field of fields) {
  field.addEventListener("change", () => mark(field));
  // While a number is typed it is not called wrong anew.
  field.addEventListener("input", () => field.hasAttribute("aria-invalid") && mark(field));
}
