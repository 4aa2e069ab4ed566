"""The golden cases: their inputs, and which bugs they catch."""
