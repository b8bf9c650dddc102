"""What an adapter is apart from its numbers: its settings, PEFT's file of them, PiSSA's start."""
