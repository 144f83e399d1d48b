"Rows of a table that were asked about"
import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision,down_revision,branch_labels,depends_on = '0002','0001',None,None

def upgrade():
    op.add_column('predictions', sa.Column('features', sa.JSON().with_variant(JSONB(), 'postgresql')))

def downgrade(): op.drop_column('predictions', 'features')
