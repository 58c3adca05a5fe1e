"""Makes the small Molmo that ships with the package: packed training sequences, fast experts, accuracy by setting, its card."""
