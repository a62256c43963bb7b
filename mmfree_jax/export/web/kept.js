// What a reload of the page must not lose. It is kept for this tab alone, until it is closed.

const PREFIX = "mmfree-chat-";

/** What was kept under a name; null where there is nothing, or the browser keeps nothing. */
export function kept(name) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** Keeps a value under a name; null forgets it. Returns whether the browser did. */
export function keep(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(PREFIX + name);
    else sessionStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch (reason) {
    console.warn(`${name} is not kept:`, reason);
    return false;
  }
}
