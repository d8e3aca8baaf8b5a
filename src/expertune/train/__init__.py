"""The trainer: configuration, data, model and adapter, TRL's SFTTrainer around them, and everything that is saved."""
