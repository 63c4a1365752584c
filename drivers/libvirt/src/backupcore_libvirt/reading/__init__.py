"""Reading a held disk: what its export shows (`export`), what is taken of it (`taken`), whether it was cut (`cut`)."""
