BEGIN TRANSACTION;
CREATE TABLE flattens (
        image INTEGER NOT NULL PRIMARY KEY REFERENCES images (number),
        "to" INTEGER NOT NULL,
        state VARCHAR(16) NOT NULL, -- what the image's was, and will be
        started VARCHAR(32) NOT NULL
    );
INSERT INTO "flattens" VALUES(1,0,'closed','2026-01-06T02:30:00.123456+00:00');
CREATE TABLE identity (
        one INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
        installation VARCHAR(32) NOT NULL
    );
INSERT INTO "identity" VALUES(1,'0123456789abcdef0123456789abcdef');
CREATE TABLE images (
        -- A number that was given once is never given again: a script may have noted it.
        number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        uuid VARCHAR(32) NOT NULL UNIQUE,
        vm_uuid VARCHAR(36) NOT NULL,
        vm_name TEXT NOT NULL,
        datastore TEXT NOT NULL,
        state VARCHAR(16) NOT NULL,
        pinned BOOLEAN NOT NULL,
        -- Why no increment is added any more; the reason of the full that follows.
        why_closed TEXT,
        -- Who took its backups; NULL where that is not known: retention lets go only of what this host has written.
        host TEXT,
        -- The date of its first full, which a flatten may have replaced.
        began VARCHAR(32)
    , installation VARCHAR(32), sequence INTEGER, notes TEXT, tags TEXT, owner TEXT, holds TEXT);
INSERT INTO "images" VALUES(1,'00000000000000000000000000000001','11111111-1111-4111-8111-111111111111','web1','nas','closed',0,NULL,'hv1','2026-01-01T02:30:00.123456+00:00','0123456789abcdef0123456789abcdef',3,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(2,'00000000000000000000000000000002','11111111-1111-4111-8111-111111111111','web1','nas','closed',0,NULL,'hv1','2099-01-02T02:30:00.123456+00:00','0123456789abcdef0123456789abcdef',4,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(3,'00000000000000000000000000000003','11111111-1111-4111-8111-111111111111','web1','nas','open',0,NULL,'hv1','2026-01-03T02:30:00.123456+00:00','0123456789abcdef0123456789abcdef',6,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(4,'00000000000000000000000000000004','11111111-1111-4111-8111-111111111111','web1','nas','closed',1,'the image was found by a rebuild of the catalog, which does not know where the disks lay then','hv2','2026-01-02T02:30:00.123456+00:00','fedcba9876543210fedcba9876543210',5,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(5,'00000000000000000000000000000005','11111111-1111-4111-8111-111111111111','web1','nas','closed',0,'the image was found by a rebuild of the catalog, which does not know where the disks lay then','hv1','2025-12-31T02:30:00.123456+00:00',NULL,2,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(6,'00000000000000000000000000000006','22222222-2222-4222-8222-222222222222','db1','nas','damaged',0,NULL,'hv1','2026-01-05T02:30:00.123456+00:00','0123456789abcdef0123456789abcdef',7,NULL,NULL,NULL,NULL);
INSERT INTO "images" VALUES(7,'00000000000000000000000000000007','22222222-2222-4222-8222-222222222222','db1','offsite','closed',0,NULL,NULL,NULL,NULL,1,NULL,NULL,NULL,NULL);
CREATE TABLE increments (
        image INTEGER NOT NULL REFERENCES images (number),
        id INTEGER NOT NULL,
        pid INTEGER NOT NULL,
        type VARCHAR(9) NOT NULL,
        point VARCHAR(32) NOT NULL,
        source VARCHAR(128) NOT NULL,
        size INTEGER NOT NULL,
        date VARCHAR(32) NOT NULL,
        consistency VARCHAR(16) NOT NULL,
        reason TEXT NOT NULL,
        digest VARCHAR(64) NOT NULL,
        disks TEXT NOT NULL,
        stored INTEGER,
        read INTEGER NOT NULL,
        frozen_seconds FLOAT NOT NULL,
        seconds FLOAT NOT NULL, sequence INTEGER, proof TEXT, probes BLOB,
        PRIMARY KEY (image, id),
        UNIQUE (image, point)
    );
INSERT INTO "increments" VALUES(1,0,-1,'FULL','00000000000000010000000000000000','s1.0',4096,'2026-01-01T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000001','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',1000,2048,0.25,1.5,1,NULL,NULL);
INSERT INTO "increments" VALUES(2,0,-1,'FULL','00000000000000020000000000000000','s2.0',4096,'2099-01-02T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000002','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',1000,2048,0.25,1.5,2,NULL,NULL);
INSERT INTO "increments" VALUES(3,1,-1,'FULL','00000000000000030000000000000001','s3.1',4096,'2026-01-04T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000003','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',1000,2048,0.25,1.5,4,NULL,NULL);
INSERT INTO "increments" VALUES(3,2,1,'INCREMENT','00000000000000030000000000000002','s3.2',4096,'2026-01-05T02:30:00.123456+00:00','crash','','0000000000000000000000000000000000000000000000000000000000000004','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',1000,2048,0.25,1.5,6,NULL,NULL);
INSERT INTO "increments" VALUES(4,0,-1,'FULL','00000000000000040000000000000000','s4.0',4096,'2026-01-02T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000005','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',NULL,2048,0.25,1.5,NULL,NULL,NULL);
INSERT INTO "increments" VALUES(5,0,-1,'FULL','00000000000000050000000000000000','s5.0',4096,'2025-12-31T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000006','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',NULL,2048,0.25,1.5,NULL,NULL,NULL);
INSERT INTO "increments" VALUES(6,0,-1,'FULL','00000000000000060000000000000000','s6.0',4096,'2026-01-05T02:30:00.123456+00:00','crash','first backup of this VM in this datastore','0000000000000000000000000000000000000000000000000000000000000007','[{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1048576, "whole": true, "reason": "", "path": "/srv/web1.qcow2", "tail": [[0, 65536]]}]',1000,2048,0.25,1.5,5,NULL,NULL);
CREATE TABLE leftovers (
        number INTEGER NOT NULL PRIMARY KEY,
        vm_uuid VARCHAR(36) NOT NULL,
        datastore TEXT NOT NULL,
        source VARCHAR(128) NOT NULL
    );
INSERT INTO "leftovers" VALUES(1,'11111111-1111-4111-8111-111111111111','nas','s3.0');
CREATE TABLE retired (
        point VARCHAR(32) NOT NULL PRIMARY KEY,
        vm_uuid VARCHAR(36) NOT NULL
    );
INSERT INTO "retired" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','11111111-1111-4111-8111-111111111111');
CREATE TABLE runs (
        id VARCHAR(32) NOT NULL PRIMARY KEY,
        -- NULL for work on a datastore as a whole.
        vm_uuid VARCHAR(36),
        vm_name TEXT,
        datastore TEXT NOT NULL,
        -- FULL or INCREMENT; NULL for a run that is no backup.
        type VARCHAR(9),
        started VARCHAR(32) NOT NULL,
        ended VARCHAR(32),
        state VARCHAR(16) NOT NULL,
        image INTEGER,
        increment INTEGER,
        error_class TEXT,
        error TEXT,
        traceback TEXT,
        -- Who took it; NULL where that is not known.
        installation VARCHAR(32),
        -- backup; flatten, verify, restore, instant and others once they are runs as well.
        kind VARCHAR(16) NOT NULL DEFAULT 'backup',
        -- How far it has come: prepare (the target, the VM), backup (the instant is fixed, data are read). A run that
        -- failed keeps the phase in which it did; NULL once it is recorded.
        phase VARCHAR(16),
        -- The ID that whoever asked for this run has given it, so that asking twice is one run.
        caller_id VARCHAR(64)
    );
INSERT INTO "runs" VALUES('00000000000000000000000000000001','11111111-1111-4111-8111-111111111111','web1','nas','FULL','2026-01-01T02:30:00.123456+00:00','2026-01-01T02:30:00.123456+00:00','recorded',1,0,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000002','11111111-1111-4111-8111-111111111111','web1','nas','FULL','2099-01-02T02:30:00.123456+00:00','2099-01-02T02:30:00.123456+00:00','recorded',2,0,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000003','11111111-1111-4111-8111-111111111111','web1','nas','FULL','2026-01-03T02:30:00.123456+00:00','2026-01-03T02:30:00.123456+00:00','recorded',3,0,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000004','11111111-1111-4111-8111-111111111111','web1','nas','INCREMENT','2026-01-03T14:00:00.123456+00:00','2026-01-03T14:00:00.123456+00:00','failed',NULL,NULL,'TargetUnavailable','/srv/store is no folder',NULL,'0123456789abcdef0123456789abcdef','backup','backup',NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000005','11111111-1111-4111-8111-111111111111','web1','nas','INCREMENT','2026-01-04T02:30:00.123456+00:00','2026-01-04T02:30:00.123456+00:00','recorded',3,1,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000006','22222222-2222-4222-8222-222222222222','db1','nas','FULL','2026-01-05T02:30:00.123456+00:00','2026-01-05T02:30:00.123456+00:00','recorded',6,0,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000007','11111111-1111-4111-8111-111111111111','web1','nas','INCREMENT','2026-01-05T02:30:00.123456+00:00','2026-01-05T02:30:00.123456+00:00','recorded',3,2,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup',NULL,NULL);
INSERT INTO "runs" VALUES('00000000000000000000000000000008','11111111-1111-4111-8111-111111111111','web1','nas','INCREMENT','2026-01-06T02:30:00.123456+00:00',NULL,'running',NULL,NULL,NULL,NULL,NULL,'0123456789abcdef0123456789abcdef','backup','backup',NULL);
CREATE INDEX ix_images_vm_uuid ON images (vm_uuid);
CREATE UNIQUE INDEX one_open_image ON images (vm_uuid, datastore) WHERE state = 'open';
CREATE INDEX ix_retired_vm_uuid ON retired (vm_uuid);
CREATE INDEX ix_leftovers_vm_uuid ON leftovers (vm_uuid);
CREATE INDEX ix_increments_sequence ON increments (sequence);
CREATE INDEX ix_runs_vm_uuid ON runs (vm_uuid);
CREATE UNIQUE INDEX one_run_per_caller_id ON runs (caller_id) WHERE caller_id IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('images',7);
COMMIT;
PRAGMA user_version = 3;
