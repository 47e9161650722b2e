"""The training application: `accelerate launch -m train configs/NAME.yaml [key=value ...]`."""
