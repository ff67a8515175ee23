"""How a run is checked and started: SuperLink, Ray, copies of processes."""
