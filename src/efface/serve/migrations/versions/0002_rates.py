"""Keys with a rate."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("rate", "burst", "level", "filled"):
        op.add_column("keys", sa.Column(name, sa.Float, nullable=True))


def downgrade() -> None:
    for name in ("rate", "burst", "level", "filled"):
        op.drop_column("keys", name)
