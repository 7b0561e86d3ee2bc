"""The mathematics of FoPE: spectrum, definition, operator. Knows no model, graph or engine."""
