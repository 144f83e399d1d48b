"Datasets and their rows, predictions, feedback"
import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision,down_revision,branch_labels,depends_on = '0001',None,None,None

# Written out, not taken from `database.metadata`: a step does what it did when it was made, whatever the tables have
# become since.
JSON = sa.JSON().with_variant(JSONB(), 'postgresql')
UTC = sa.DateTime(timezone=True)

def upgrade():
    op.create_table('datasets',
        sa.Column('dataset_id', sa.Text(), nullable=False), sa.Column('name', sa.Text(), nullable=False),
                    sa.Column('version', sa.Integer(), nullable=False),
        sa.Column('fingerprint', sa.Text(), nullable=False), sa.Column('created_at', UTC, nullable=False),
                    sa.Column('kind', sa.Text(), nullable=False),
        sa.Column('source', sa.Text(), nullable=False), sa.Column('target', sa.Text(), nullable=False),
                    sa.Column('group', sa.Text(), nullable=False),
        sa.Column('columns', JSON, nullable=False), sa.Column('rows', sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint('dataset_id', name='pk_datasets'),
                    sa.UniqueConstraint('name', 'version', name='uq_datasets_name_version'),
        sa.UniqueConstraint('name', 'fingerprint', name='uq_datasets_name_fingerprint'))
    op.create_table('training_data',
        sa.Column('dataset_id', sa.Text(), nullable=False), sa.Column('row', sa.Integer(), nullable=False),
                    sa.Column('label', sa.Text()), sa.Column('group', sa.Text()),
        sa.Column('path', sa.Text()), sa.Column('sha256', sa.Text()), sa.Column('features', JSON, nullable=False),
        sa.PrimaryKeyConstraint('dataset_id', 'row', name='pk_training_data'),
        sa.ForeignKeyConstraint(['dataset_id'], ['datasets.dataset_id'], name='fk_training_data_dataset_id_datasets',
                                ondelete='CASCADE'))
    op.create_index('ix_training_data_label', 'training_data', ['label'])
    op.create_table('predictions',
        sa.Column('prediction_id', sa.Text(), nullable=False), sa.Column('created_at', UTC, nullable=False),
                    sa.Column('request_id', sa.Text()), sa.Column('endpoint', sa.Text()),
        sa.Column('api_key', sa.Text()), sa.Column('model_version', sa.Text()), sa.Column('sha256', sa.Text()),
                    sa.Column('label', sa.Text()), sa.Column('top', sa.Text()),
        sa.Column('confidence', sa.Double()), sa.Column('probabilities', JSON), sa.Column('prediction_set', JSON),
                    sa.Column('coverage', sa.Double()),
        sa.Column('novelty', sa.Double()), sa.Column('reason', sa.Text()), sa.Column('route', sa.Text()),
                    sa.Column('duration_ms', sa.Double()), sa.Column('cached', sa.Boolean()),
        sa.PrimaryKeyConstraint('prediction_id', name='pk_predictions'))
    op.create_index('ix_predictions_created_at', 'predictions', ['created_at'])
    op.create_index('ix_predictions_model_version_created_at', 'predictions', ['model_version', 'created_at'])
    op.create_table('feedback',
        sa.Column('feedback_id', sa.Text(), nullable=False), sa.Column('prediction_id', sa.Text(), nullable=False),
                    sa.Column('created_at', UTC, nullable=False),
        sa.Column('request_id', sa.Text()), sa.Column('true_label', sa.Text(), nullable=False),
                    sa.Column('comment', sa.Text()), sa.Column('api_key', sa.Text()),
        sa.PrimaryKeyConstraint('feedback_id', name='pk_feedback'))
    op.create_index('ix_feedback_created_at', 'feedback', ['created_at'])
    op.create_index('ix_feedback_prediction_id', 'feedback', ['prediction_id'])

def downgrade():
    for table in ('feedback', 'predictions', 'training_data', 'datasets'): op.drop_table(table)
