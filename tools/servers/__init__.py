"""Throw-away servers for tests: PostgreSQL, pgbouncer before it, RabbitMQ and Kafka, on free ports, in a scratch folder.

services.py (command line) ─┐
tests/services.py ──────────┴─▶ sets ─▶ postgresql, rabbitmq, kafka, pgbouncer ─▶ process, install
                                 │
                                 └─▶ state: FOLDER/services.json, what runs and how it is started again
"""
