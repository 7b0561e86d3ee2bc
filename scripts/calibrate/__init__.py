"""How often the parity rule refuses what is right, and how small a fault it still refuses, on models of many shapes."""
