"""One HTML page from the results of the other measurements, a file per topic: its text, table and charts."""
