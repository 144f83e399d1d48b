"What Alembic runs: the steps in `versions/`, on the connection that `amulet_hybrid.store.database` opened and locked"
from alembic import context

from amulet_hybrid.store.database import metadata

connection = context.config.attributes['connection']
context.configure(connection=connection, target_metadata=metadata(), render_as_batch=connection.dialect.name=='sqlite', compare_type=True)
with context.begin_transaction(): context.run_migrations()
