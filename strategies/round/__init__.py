"""One round: its replies, their intake, who trains which rank, and the clients' evaluation."""
