"""Throw-away servers for tests: PostgreSQL, RabbitMQ and Kafka, on free loopback ports, in a scratch folder.

services.py (command line) ─┐
tests/services.py ──────────┴─▶ sets ─▶ postgresql, rabbitmq, kafka ─▶ process, install
                                 │
                                 └─▶ state: FOLDER/services.json, what runs and how it is started again
"""
