"""Victims: frozen video classifiers behind a metered query interface that gives answers only."""
