-- A ledger that hogwild 0.1 with schema 1 wrote, as `sqlite3 ledger.sqlite .dump` shows it.
BEGIN TRANSACTION;
CREATE TABLE checkpoints (
  checkpoint_id INTEGER PRIMARY KEY,
  marker        INTEGER NOT NULL,        -- every pass up to this pass_id is in it
  step          INTEGER NOT NULL,
  path          TEXT NOT NULL,
  completed_at  TEXT NOT NULL            -- UTC
) STRICT;
INSERT INTO "checkpoints" VALUES(1,2,2,'one','2026-11-25T13:39:08.669Z');
INSERT INTO "checkpoints" VALUES(2,5,5,'two','2026-11-25T13:39:08.677Z');
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
INSERT INTO "examples" VALUES(1,1,1,0,NULL,0,1,1,NULL,1,0.5,NULL,'durable');
INSERT INTO "examples" VALUES(2,1,3,0,NULL,0,2,2,NULL,5,0.5,NULL,'durable');
INSERT INTO "examples" VALUES(3,1,4,0,NULL,0,1,1,NULL,6,0.5,NULL,'trained');
INSERT INTO "examples" VALUES(4,3,1,0,NULL,0,1,0,NULL,0,NULL,'5000 tokens','failed');
INSERT INTO "examples" VALUES(5,3,2,0,NULL,0,1,0,NULL,0,NULL,NULL,'accepted');
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
INSERT INTO "files" VALUES(1,'facts.jsonl','hash-1',60,'accepted',0,'facts.jsonl',0,'2026-11-25T13:39:08.657Z');
INSERT INTO "files" VALUES(2,'bad.jsonl','hash-2',0,'rejected',0,'bad.jsonl',0,'2026-11-25T13:39:08.661Z');
INSERT INTO "files" VALUES(3,'more.jsonl','hash-3',0,'accepted',0,'more.jsonl',0,'2026-11-25T13:39:08.665Z');
CREATE TABLE lines (                     -- the examples as they were written; apart, to keep `examples` small
  example_id INTEGER PRIMARY KEY REFERENCES examples,
  line       TEXT NOT NULL
) STRICT;
INSERT INTO "lines" VALUES(1,'{"text": "Zoë"}');
INSERT INTO "lines" VALUES(2,'{"text": "b", "passes": 2}');
INSERT INTO "lines" VALUES(3,'{"text": "c"}');
INSERT INTO "lines" VALUES(4,'{"text": "d"}');
INSERT INTO "lines" VALUES(5,'{"text": "e"}');
CREATE TABLE meta (                      -- facts about the whole ledger, such as the arena that it describes
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "meta" VALUES('arena_id','arena');
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
INSERT INTO "passes" VALUES(1,1,'2026-11-25T13:39:08.669Z',1.0,0.5,3,1,0,'arena',0);
INSERT INTO "passes" VALUES(2,2,'2026-11-25T13:39:08.669Z',1.0,0.5,3,1,0,'arena',0);
INSERT INTO "passes" VALUES(3,2,'2026-11-25T13:39:08.673Z',1.0,0.5,3,1,0,'arena',1);
INSERT INTO "passes" VALUES(4,3,'2026-11-25T13:39:08.673Z',1.0,0.5,3,1,0,'arena',1);
INSERT INTO "passes" VALUES(5,2,'2026-11-25T13:39:08.677Z',1.0,0.5,3,1,0,'arena',0);
INSERT INTO "passes" VALUES(6,3,'2026-11-25T13:39:08.681Z',1.0,0.5,3,1,0,'arena',0);
CREATE TABLE rejected (                  -- lines that cannot become examples
  file_id     INTEGER NOT NULL REFERENCES files,
  line_no     INTEGER NOT NULL,          -- 0: the whole file
  byte_offset INTEGER NOT NULL,
  field       TEXT,
  reason      TEXT NOT NULL,
  excerpt     TEXT NOT NULL              -- the line's beginning
) STRICT;
INSERT INTO "rejected" VALUES(1,2,17,'txt','unknown field','{"txt": 1}');
INSERT INTO "rejected" VALUES(2,1,0,NULL,'not JSON','x');
CREATE UNIQUE INDEX files_content ON files (content_hash) WHERE state = 'accepted' AND NOT forced;
CREATE INDEX files_moving ON files (file_id) WHERE NOT moved;
CREATE INDEX examples_next    ON examples (passes_done, priority DESC, example_id) WHERE state = 'accepted';
CREATE INDEX examples_trained ON examples (last_pass) WHERE state = 'trained';
CREATE INDEX examples_by_file ON examples (file_id, state);
CREATE INDEX rejected_by_file ON rejected (file_id, line_no);
CREATE INDEX passes_by_example ON passes (example_id);
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
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('passes',6);
PRAGMA user_version = 1;
PRAGMA application_id = 1213155159;
COMMIT;
