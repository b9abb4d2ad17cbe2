"""What is computed: each op with its shapes, its cost and its float64 reference."""
