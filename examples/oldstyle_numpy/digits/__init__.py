"""A Flower project of the old style: NumPyClient, client_fn and server_fn."""
