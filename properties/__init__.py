"""What must hold: strategies and laws. ``pytest --pyargs mla_spec.properties`` runs them."""
