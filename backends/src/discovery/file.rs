//! Workers listed in a file, which is read when `stat` says that it changed.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Deserialize;
use tokio::io::AsyncReadExt;

use super::{Error, Place, address};

/// Some ten thousand workers.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an address, or an object with `url` and, if wanted, `name` and `model`")]
enum Line {
    Url(String),
    Worker(Worker),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Worker {
    url: String,
    name: Option<String>,
    model: Option<String>,
}

/// Device, inode, length and times of modification and change: what tells one state of a file from the next.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

pub(super) struct File {
    path: PathBuf,
    /// As it was when it was read last.
    read: Option<Stamp>,
}

impl File {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, read: None }
    }

    pub(super) async fn look(&mut self) -> Result<Option<Vec<Place>>, Error> {
        let of = tokio::fs::metadata(&self.path).await?;
        let stamp = (of.dev(), of.ino(), of.size(), (of.mtime(), of.mtime_nsec()), (of.ctime(), of.ctime_nsec()));
        if self.read == Some(stamp) {
            return Ok(None);
        }
        let mut text = Vec::new();
        tokio::fs::File::open(&self.path).await?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).await?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(Error::File(std::io::ErrorKind::FileTooLarge.into()));
        }
        let places = parse(&text)?;
        // Not sooner: a file that was being written is looked at again.
        self.read = Some(stamp);
        Ok(Some(places))
    }
}

fn parse(text: &[u8]) -> Result<Vec<Place>, Error> {
    let lines: Vec<Line> = serde_json::from_slice(text)?;
    let place = |line| match line {
        Line::Url(url) => Ok(Place { url: address(&url)?, name: None, model: None, draining: false }),
        Line::Worker(Worker { url, name, model }) => Ok(Place { url: address(&url)?, name, model, draining: false }),
    };
    lines.into_iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_or_refused_whole() {
        let places = parse(br#"["http://a:1/x/v1/", {"url":"https://b","name":"n","model":"m"}]"#).unwrap();
        let (url, some) = (|text| Url::parse(text).unwrap(), |text: &str| Some(text.to_owned()));
        assert_eq!(places[0], Place { url: url("http://a:1/x"), name: None, model: None, draining: false });
        assert_eq!(places[1], Place { url: url("https://b"), name: some("n"), model: some("m"), draining: false });
        assert_eq!(parse(b"[]").unwrap(), []);
        for bad in [
            "",
            "{}",
            "[1]",
            "[\"http://a:1\"",
            r#"[{"name":"n"}]"#,
            r#"[{"url":"http://a","port":1}]"#,
            r#"["a:1"]"#,
            r#"["ftp://a"]"#,
            r#"["http://a:0"]"#,
            r#"["http://u:p@a"]"#,
            r#"["http://a?x"]"#,
            r#"["http://a","b"]"#,
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn only_a_change_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("workers.json");
        let mut file = File::new(path.clone());
        assert!(file.look().await.is_err());
        std::fs::write(&path, "[\"http://a:1\"").unwrap();
        assert!(file.look().await.is_err());
        assert!(file.look().await.is_err(), "what could not be read is tried again");
        std::fs::write(&path, "[\"http://a:1\"]").unwrap();
        assert_eq!(file.look().await.unwrap().unwrap().len(), 1);
        assert!(file.look().await.unwrap().is_none());
        std::fs::write(&path, "[]").unwrap();
        assert_eq!(file.look().await.unwrap().unwrap(), []);
    }

    use url::Url;
}
