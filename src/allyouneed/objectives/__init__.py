"""What training minimises: pure functions of a module and a batch."""
