"""The ledger's tables, as `sqlite3 ledger.sqlite .schema` shows them, and how older ledgers become current.

A migration is appended, never edited: `MIGRATIONS[n]` takes a ledger from version n to n + 1.
"""

APPLICATION_ID = 0x484F4757  # "HOGW": tells a ledger from any other SQLite file

_V1 = """
CREATE TABLE meta (                      -- facts about the whole ledger, such as the arena that it describes
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE files (
  file_id      INTEGER PRIMARY KEY,
  name         TEXT NOT NULL,            -- as it was dropped
  content_hash TEXT NOT NULL,            -- SHA-256 of the decompressed content, hex
  bytes        INTEGER NOT NULL,         -- on disk, compressed or not
  state        TEXT NOT NULL CHECK (state IN (
                 'staging',              --   being read; after a crash it is read again from the start
                 'accepted',             --   its examples are ours
                 'rejected')),           --   not one good line
  forced       INTEGER NOT NULL,         -- 1: learned again on purpose
  stored_as    TEXT NOT NULL,            -- its name in done/ or failed/
  moved        INTEGER NOT NULL,         -- 1: it has left incoming/
  accepted_at  TEXT                      -- UTC
) STRICT;
CREATE UNIQUE INDEX files_content ON files (content_hash) WHERE state = 'accepted' AND NOT forced;
CREATE INDEX files_moving ON files (file_id) WHERE NOT moved;

CREATE TABLE examples (
  example_id  INTEGER PRIMARY KEY,       -- in order of arrival
  file_id     INTEGER NOT NULL REFERENCES files,
  line_no     INTEGER NOT NULL,          -- from 1
  byte_offset INTEGER NOT NULL,          -- in the decompressed content
  name        TEXT,                      -- the line's own "id"
  priority    INTEGER NOT NULL,          -- higher first
  passes      INTEGER NOT NULL,          -- wanted
  passes_done INTEGER NOT NULL DEFAULT 0,
  until_loss  REAL,                      -- nats per token; reached: enough passes
  last_pass   INTEGER NOT NULL DEFAULT 0,-- passes.pass_id of the newest that counts
  last_loss   REAL,
  reason      TEXT,                      -- why it failed
  state       TEXT NOT NULL CHECK (state IN (
                'staged',                --   its file is not all read, or not all shown yet
                'accepted',              --   passes are still to be done
                'trained',               --   all passes are in the live weights
                'durable',               --   ... and in a checkpoint
                'failed'))               --   cannot be trained
) STRICT;
CREATE INDEX examples_next    ON examples (passes_done, priority DESC, example_id) WHERE state = 'accepted';
CREATE INDEX examples_trained ON examples (last_pass) WHERE state = 'trained';
CREATE INDEX examples_by_file ON examples (file_id, state);

CREATE TABLE lines (                     -- the examples as they were written; apart, to keep `examples` small
  example_id INTEGER PRIMARY KEY REFERENCES examples,
  line       TEXT NOT NULL
) STRICT;

CREATE TABLE rejected (                  -- lines that cannot become examples
  file_id     INTEGER NOT NULL REFERENCES files,
  line_no     INTEGER NOT NULL,          -- 0: the whole file
  byte_offset INTEGER NOT NULL,
  field       TEXT,
  reason      TEXT NOT NULL,
  excerpt     TEXT NOT NULL              -- the line's beginning
) STRICT;
CREATE INDEX rejected_by_file ON rejected (file_id, line_no);

CREATE TABLE passes (                    -- one row each time that an example moved the weights
  pass_id     INTEGER PRIMARY KEY AUTOINCREMENT,
  example_id  INTEGER NOT NULL REFERENCES examples,
  at          TEXT NOT NULL,             -- UTC
  loss_before REAL,                      -- mean, nats per trained token; NULL: not a number
  loss_after  REAL,
  tokens      INTEGER NOT NULL,          -- trained
  step        INTEGER NOT NULL,
  thread      INTEGER NOT NULL,
  arena       TEXT NOT NULL,             -- the weights that it moved
  undone      INTEGER NOT NULL DEFAULT 0 -- 1: those weights were lost or rolled back
) STRICT;
CREATE INDEX passes_by_example ON passes (example_id);

CREATE TABLE checkpoints (
  checkpoint_id INTEGER PRIMARY KEY,
  marker        INTEGER NOT NULL,        -- every pass up to this pass_id is in it
  step          INTEGER NOT NULL,
  path          TEXT NOT NULL,
  completed_at  TEXT NOT NULL            -- UTC
) STRICT;
CREATE INDEX checkpoints_marker ON checkpoints (marker);

CREATE VIEW progress AS                  -- SELECT * FROM progress;
  SELECT name AS file, accepted_at,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id) AS examples,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'accepted') AS pending,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'trained') AS trained,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'durable') AS durable,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'failed') AS failed,
    (SELECT count(*) FROM rejected r WHERE r.file_id = f.file_id) AS rejected
  FROM files f WHERE state <> 'staging';
"""

_REPLAY = """
ALTER TABLE passes ADD COLUMN replay INTEGER NOT NULL DEFAULT 0;
  -- 1: an example that was learned before, mixed into a step; counts neither in passes_done nor for its state
ALTER TABLE examples ADD COLUMN weight REAL NOT NULL DEFAULT 1;     -- of its loss; negative: unlearn
ALTER TABLE examples ADD COLUMN tags TEXT NOT NULL DEFAULT '';      -- one a line
ALTER TABLE examples ADD COLUMN reopened INTEGER NOT NULL DEFAULT 0;-- times that it was forgotten and got passes again
UPDATE examples SET weight = -1 WHERE example_id IN
  (SELECT example_id FROM lines WHERE CASE WHEN json_valid(line) THEN json_extract(line, '$.weight') < 0 END);
CREATE INDEX examples_replayable ON examples (example_id) WHERE state IN ('trained', 'durable') AND weight > 0;
CREATE INDEX passes_replayed ON passes (pass_id) WHERE replay AND NOT undone;
"""

MIGRATIONS = (_V1, _REPLAY)
VERSION = len(MIGRATIONS)
