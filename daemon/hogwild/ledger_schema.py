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

# A CHECK cannot be altered: the table is written anew. Foreign keys are off while migrations run.
_V2 = """
DROP VIEW progress;
CREATE TABLE examples_v2 (
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
  state       TEXT NOT NULL CHECK (state IN (
                'staged',                --   its file is not all read, or not all shown yet
                'accepted',              --   passes are still to be done
                'trained',               --   all passes are in the live weights
                'durable',               --   ... and in a checkpoint
                'failed',                --   cannot be trained
                'undone')),              --   a rollback took its passes back, and it is to stay out
  reason      TEXT,                      -- why it failed, was undone, or is to be trained again
  field       TEXT                       -- failed: the JSON field at fault
) STRICT;
INSERT INTO examples_v2
  SELECT example_id, file_id, line_no, byte_offset, name, priority, passes, passes_done, until_loss, last_pass,
         last_loss, state, reason, NULL FROM examples;
DROP TABLE examples;
ALTER TABLE examples_v2 RENAME TO examples;
CREATE INDEX examples_next    ON examples (passes_done, priority DESC, example_id) WHERE state = 'accepted';
CREATE INDEX examples_trained ON examples (last_pass) WHERE state = 'trained';
CREATE INDEX examples_undone  ON examples (example_id) WHERE state = 'undone';
CREATE INDEX examples_by_file ON examples (file_id, state);

ALTER TABLE files ADD COLUMN errors_due INTEGER NOT NULL DEFAULT 0;  -- errors that failed/<name>.errors.jsonl lacks
ALTER TABLE files ADD COLUMN content_bytes INTEGER;                  -- decompressed, up to the last line taken
ALTER TABLE files ADD COLUMN may_grow INTEGER NOT NULL DEFAULT 0;    -- 1: somebody may still be writing to it
ALTER TABLE files ADD COLUMN continues INTEGER REFERENCES files;     -- it is what that file grew by, later
CREATE INDEX files_errors_due ON files (file_id) WHERE errors_due > 0;
CREATE INDEX files_may_grow ON files (file_id) WHERE may_grow;
CREATE INDEX files_stored_as ON files (stored_as);

ALTER TABLE checkpoints ADD COLUMN generation INTEGER;               -- its number in the history, never used again
ALTER TABLE checkpoints ADD COLUMN parent INTEGER;                   -- the generation that its weights descend from
ALTER TABLE checkpoints ADD COLUMN undone INTEGER NOT NULL DEFAULT 0;-- 1: the weights went back to one before it
ALTER TABLE checkpoints ADD COLUMN follows INTEGER REFERENCES checkpoints; -- it also holds the passes of this one

CREATE TABLE checkpoint_passes (         -- passes that a checkpoint holds beyond the one that it follows
  checkpoint_id INTEGER NOT NULL REFERENCES checkpoints,
  first_pass    INTEGER NOT NULL,        -- passes.pass_id
  last_pass     INTEGER NOT NULL,        -- included
  PRIMARY KEY (checkpoint_id, first_pass)
) STRICT, WITHOUT ROWID;
UPDATE checkpoints AS c SET follows =
  (SELECT max(checkpoint_id) FROM checkpoints b WHERE b.checkpoint_id < c.checkpoint_id);
INSERT INTO checkpoint_passes
  SELECT checkpoint_id, min(pass_id), max(pass_id) FROM (
    SELECT checkpoint_id, pass_id, pass_id - row_number() OVER (PARTITION BY checkpoint_id ORDER BY pass_id) AS run
    FROM (SELECT pass_id, (SELECT checkpoint_id FROM checkpoints WHERE marker >= pass_id
                           ORDER BY marker, checkpoint_id LIMIT 1) AS checkpoint_id FROM passes WHERE NOT undone)
    WHERE checkpoint_id IS NOT NULL)
  GROUP BY checkpoint_id, run;

CREATE TABLE transitions (               -- every change of state since schema 2, written by the triggers below
  transition_id INTEGER PRIMARY KEY,
  at         TEXT NOT NULL,              -- UTC
  file_id    INTEGER REFERENCES files,   -- of a file; its lines are accepted in the same moment
  example_id INTEGER REFERENCES examples,-- or of an example
  from_state TEXT NOT NULL,
  to_state   TEXT NOT NULL,
  why        TEXT NOT NULL,
  pass_id    INTEGER                     -- of an example: its newest pass that counts, with loss and step
) STRICT;
CREATE INDEX transitions_of_example ON transitions (example_id) WHERE example_id IS NOT NULL;
CREATE INDEX transitions_of_file    ON transitions (file_id) WHERE file_id IS NOT NULL;

CREATE TRIGGER file_changed AFTER UPDATE OF state ON files WHEN old.state <> new.state BEGIN
  INSERT INTO transitions (at, file_id, from_state, to_state, why)
  VALUES (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), new.file_id, old.state, new.state,
          iif(new.state = 'rejected', 'no line of it is good', 'read to its end'));
END;
CREATE TRIGGER example_changed AFTER UPDATE OF state ON examples
WHEN old.state <> new.state AND old.state <> 'staged' BEGIN
  INSERT INTO transitions (at, example_id, from_state, to_state, why, pass_id)
  VALUES (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), new.example_id, old.state, new.state,
          coalesce(new.reason, CASE
            WHEN new.state = 'durable' THEN 'in checkpoint ' || (SELECT max(checkpoint_id) FROM checkpoints)
            WHEN new.state = 'trained' AND new.passes_done < new.passes THEN 'its loss reached until_loss'
            WHEN new.state = 'trained' THEN 'all its passes are done'
            ELSE 'not said' END),
          nullif(new.last_pass, 0));
END;

CREATE VIEW progress AS                  -- SELECT * FROM progress;
  SELECT name AS file, accepted_at,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id) AS examples,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'accepted') AS pending,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'trained') AS trained,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'durable') AS durable,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'failed') AS failed,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'undone') AS undone,
    (SELECT count(*) FROM rejected r WHERE r.file_id = f.file_id) AS rejected
  FROM files f WHERE state <> 'staging';
CREATE VIEW story AS                     -- SELECT * FROM story WHERE example_id = 7;
  SELECT e.example_id, f.accepted_at AS at, 'accepted' AS event, NULL AS why, NULL AS loss, NULL AS step
    FROM examples e JOIN files f USING (file_id) WHERE f.state = 'accepted'
  UNION ALL
  SELECT example_id, at, iif(undone, 'pass, undone since', 'pass'), NULL, coalesce(loss_after, loss_before), step
    FROM passes
  UNION ALL
  SELECT example_id, at, to_state, why, NULL, NULL FROM transitions WHERE example_id IS NOT NULL;
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

DROP VIEW story;
CREATE VIEW story AS                     -- SELECT * FROM story WHERE example_id = 7;
  SELECT e.example_id, f.accepted_at AS at, 'accepted' AS event, NULL AS why, NULL AS loss, NULL AS step
    FROM examples e JOIN files f USING (file_id) WHERE f.state = 'accepted'
  UNION ALL
  SELECT example_id, at, iif(replay, 'replay', 'pass') || iif(undone, ', undone since', ''), NULL,
         coalesce(loss_after, loss_before), step FROM passes
  UNION ALL
  SELECT example_id, at, to_state, why, NULL, NULL FROM transitions WHERE example_id IS NOT NULL;
"""

# As _V2: a state more, and a CHECK cannot be altered.
_GUARD = """
DROP VIEW progress;
DROP VIEW story;
CREATE TABLE examples_v4 (
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
  state       TEXT NOT NULL CHECK (state IN (
                'staged',                --   its file is not all read, or not all shown yet
                'accepted',              --   passes are still to be done
                'trained',               --   all passes are in the live weights
                'durable',               --   ... and in a checkpoint
                'failed',                --   cannot be trained
                'undone',                --   a rollback took its passes back, and it is to stay out
                'quarantined')),         --   a guard has set it aside, see the table `evidence`
  reason      TEXT,                      -- why it failed, was undone or set aside, or is to be trained again
  field       TEXT,                      -- failed: the JSON field at fault
  weight      REAL NOT NULL DEFAULT 1,   -- of its loss; negative: unlearn
  tags        TEXT NOT NULL DEFAULT '',  -- one a line
  reopened    INTEGER NOT NULL DEFAULT 0 -- times that it was forgotten and got passes again
) STRICT;
INSERT INTO examples_v4
  SELECT example_id, file_id, line_no, byte_offset, name, priority, passes, passes_done, until_loss, last_pass,
         last_loss, state, reason, field, weight, tags, reopened FROM examples;
DROP TABLE examples;
ALTER TABLE examples_v4 RENAME TO examples;
CREATE INDEX examples_next    ON examples (passes_done, priority DESC, example_id) WHERE state = 'accepted';
CREATE INDEX examples_trained ON examples (last_pass) WHERE state = 'trained';
CREATE INDEX examples_undone  ON examples (example_id) WHERE state IN ('undone', 'quarantined');
CREATE INDEX examples_by_file ON examples (file_id, state);
CREATE INDEX examples_replayable ON examples (example_id) WHERE state IN ('trained', 'durable') AND weight > 0;
CREATE TRIGGER example_changed AFTER UPDATE OF state ON examples
WHEN old.state <> new.state AND old.state <> 'staged' BEGIN
  INSERT INTO transitions (at, example_id, from_state, to_state, why, pass_id)
  VALUES (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), new.example_id, old.state, new.state,
          coalesce(new.reason, CASE
            WHEN new.state = 'durable' THEN 'in checkpoint ' || (SELECT max(checkpoint_id) FROM checkpoints)
            WHEN new.state = 'trained' AND new.passes_done < new.passes THEN 'its loss reached until_loss'
            WHEN new.state = 'trained' THEN 'all its passes are done'
            ELSE 'not said' END),
          nullif(new.last_pass, 0));
END;

CREATE TABLE trips (                     -- every time that a guard stopped something
  trip_id    INTEGER PRIMARY KEY,
  at         TEXT NOT NULL,              -- UTC
  guard      TEXT NOT NULL,              -- 'probes', 'loss', 'update', 'growth'
  step       INTEGER NOT NULL,           -- training steps done then
  generation INTEGER,                    -- that was gone back to
  about      TEXT NOT NULL               -- JSON: what was measured
) STRICT;
CREATE TABLE evidence (                  -- what spoke against an example that was set aside
  trip_id    INTEGER NOT NULL REFERENCES trips,
  example_id INTEGER NOT NULL REFERENCES examples,
  after_pass INTEGER NOT NULL,           -- newest pass then: what came before does not count again
  about      TEXT NOT NULL,              -- JSON: its losses, update norms, steps
  PRIMARY KEY (trip_id, example_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX evidence_of_example ON evidence (example_id);
CREATE TABLE series (                    -- measurements over time: probes, and how fast the server answers
  at    TEXT NOT NULL,                   -- UTC
  name  TEXT NOT NULL,
  step  INTEGER NOT NULL,                -- training steps done then
  value REAL                             -- NULL: not a number
) STRICT;
CREATE INDEX series_by_name ON series (name, at);

CREATE VIEW progress AS                  -- SELECT * FROM progress;
  SELECT name AS file, accepted_at,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id) AS examples,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'accepted') AS pending,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'trained') AS trained,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'durable') AS durable,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'failed') AS failed,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'undone') AS undone,
    (SELECT count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'quarantined') AS quarantined,
    (SELECT count(*) FROM rejected r WHERE r.file_id = f.file_id) AS rejected
  FROM files f WHERE state <> 'staging';
CREATE VIEW story AS                     -- SELECT * FROM story WHERE example_id = 7;
  SELECT e.example_id, f.accepted_at AS at, 'accepted' AS event, NULL AS why, NULL AS loss, NULL AS step
    FROM examples e JOIN files f USING (file_id) WHERE f.state = 'accepted'
  UNION ALL
  SELECT example_id, at, iif(replay, 'replay', 'pass') || iif(undone, ', undone since', ''), NULL,
         coalesce(loss_after, loss_before), step FROM passes
  UNION ALL
  SELECT example_id, at, to_state, why, NULL, NULL FROM transitions WHERE example_id IS NOT NULL;
"""

_RESTARTS = """
CREATE TABLE growing (                   -- files in done/ and failed/ that somebody may still be writing to
  stored_as     TEXT PRIMARY KEY,        -- its name there
  file_id       INTEGER NOT NULL REFERENCES files, -- that has its lines: of a duplicate, the file that came first
  name          TEXT NOT NULL,           -- as it was dropped
  content_hash  TEXT NOT NULL,           -- of what has been taken of it, decompressed
  bytes         INTEGER NOT NULL,        -- on disk, when that was taken
  content_bytes INTEGER NOT NULL         -- decompressed, up to the last line taken
) STRICT, WITHOUT ROWID;
INSERT OR REPLACE INTO growing
  SELECT stored_as, file_id, name, content_hash, bytes, content_bytes FROM files
  WHERE may_grow AND state <> 'staging' ORDER BY file_id;
DROP INDEX files_may_grow;
ALTER TABLE files DROP COLUMN may_grow;

CREATE TABLE strikes (                   -- what speaks against an example, until it is trained or set aside
  strike_id  INTEGER PRIMARY KEY,        -- in order
  example_id INTEGER NOT NULL REFERENCES examples,
  guard      TEXT NOT NULL,              -- 'loss', 'update'; 'crash': noted before a step, and taken back after it
  about      TEXT NOT NULL               -- JSON: what was measured
) STRICT;
CREATE INDEX strikes_of_example ON strikes (example_id);
"""

MIGRATIONS = (_V1, _V2, _REPLAY, _GUARD, _RESTARTS)

VERSION = len(MIGRATIONS)

OWN = "NOT replay"  # SQL: the passes that count for their example's passes_done and state, if they are not undone
