"""The sweep over the paper's tables: their cells as data, and what runs, chooses, tabulates and prices them."""
