"""RabbitMQ as a broker."""

from trilogue.brokers.rabbitmq import link as link
