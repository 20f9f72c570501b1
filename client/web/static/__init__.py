"""Files of the page that never change while the server runs: styles, scripts, libraries."""
