// Sets the chosen theme before the page is drawn, so that it does not flash in the other one.
try {
  const theme = localStorage.getItem("pos2d-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is off: the theme of the system applies.
}
