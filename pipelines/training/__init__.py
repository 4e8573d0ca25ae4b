"""What surrounds a pretraining: its key, its resumable state, when to save, its pace, the doctor's words."""
