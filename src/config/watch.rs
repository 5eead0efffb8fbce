//! Notices that the config file changed, from nothing but what `stat` says.
//!
//! A change counts when two looks in a row see the same new file, so that one that is still being written is left
//! alone; a file that is gone is no change (many editors save by removing and renaming). Links are followed, which is
//! how a Kubernetes ConfigMap changes.
//!
//! Not here: the clock (whoever owns the watch looks once a second), and other files that the config names: secrets and
//! tokenizers are read again with the next reload.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// What distinguishes one state of a file from the next. The change time is in it for copies that keep the modification
/// time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The file, as it was when it was last taken, and as it was at the last look.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    taken: Option<Stamp>,
    seen: Option<Stamp>,
}

impl Watch {
    /// Call before reading the file, so that a change in between is not missed.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        let taken = stamp(&path);
        Self { path, taken, seen: taken }
    }

    /// Whether the file should be read again. True once a change, also when what is read then turns out to be bad.
    pub fn look(&mut self) -> bool {
        let now = stamp(&self.path);
        self.step(now)
    }

    fn step(&mut self, now: Option<Stamp>) -> bool {
        let settled = now.is_some() && now == self.seen;
        self.seen = now;
        let changed = settled && now != self.taken;
        if changed {
            self.taken = now;
        }
        changed
    }
}

fn stamp(path: &std::path::Path) -> Option<Stamp> {
    let file = std::fs::metadata(path).ok()?;
    Some(Stamp {
        device: file.dev(),
        inode: file.ino(),
        bytes: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
        changed: (file.ctime(), file.ctime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: u64) -> Option<Stamp> {
        Some(Stamp { device: 1, inode, bytes: 9, modified: (0, 0), changed: (0, 0) })
    }

    #[test]
    fn a_change_counts_once_it_has_settled() {
        let check = |looks: &[Option<Stamp>], expect: &[bool]| {
            let mut watch = Watch { path: PathBuf::new(), taken: file(1), seen: file(1) };
            let seen: Vec<bool> = looks.iter().map(|look| watch.step(*look)).collect();
            assert_eq!(seen, expect, "{looks:?}");
        };
        check(&[file(1), file(1)], &[false, false]);
        check(&[file(2), file(2), file(2)], &[false, true, false]);
        check(&[file(2), file(3), file(3)], &[false, false, true]);
        check(&[file(2), file(1), file(1)], &[false, false, false]);
        check(&[None, None, file(2), file(2)], &[false, false, false, true]);
        check(&[None, file(1), file(1)], &[false, false, false]);
    }

    #[test]
    fn a_file_replaced_through_a_link_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, link] = ["one", "two", "forebay.toml"].map(|name| dir.path().join(name));
        std::fs::write(&one, "same").unwrap();
        std::fs::write(&two, "same").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let mut watch = Watch::new(link.clone());
        assert!(!watch.look());
        std::fs::remove_file(&link).unwrap();
        assert!(!watch.look());
        std::os::unix::fs::symlink(&two, &link).unwrap();
        assert!(!watch.look());
        assert!(watch.look());
        assert!(!watch.look());
    }
}
