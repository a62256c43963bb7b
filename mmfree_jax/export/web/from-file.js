// Browsers run no module scripts from file://; this one is a classic script and can say so.
if (location.protocol === "file:") {
  const error = document.getElementById("error");
  error.textContent =
    "This page has to come from a web server: run `python -m http.server --bind 127.0.0.1` in the " +
    "exported folder and open http://127.0.0.1:8000/web/";
  error.hidden = false;
  document.getElementById("loading").hidden = true;
}
