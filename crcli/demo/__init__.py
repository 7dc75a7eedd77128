"""The main job in small: an agent dumped, killed, restored, and shown to go on."""
