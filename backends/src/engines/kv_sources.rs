//! vLLM's `/kv_event_sources`: an object with the settings of each data-parallel rank's publisher, by the rank's number
//! (0.32.0, `entrypoints/serve/instrumentator/basic.py`); empty where nothing is published.

use std::collections::BTreeMap;

use serde::Deserialize;
use url::Url;

use crate::{signals::kv_events::KvSource, transport::zmtp::Address};

#[derive(Deserialize)]
struct Publisher {
    enable_kv_cache_events: bool,
    publisher: Option<String>,
    endpoint: String,
    replay_endpoint: Option<String>,
}

/// The publisher of a rank, as seen from here: it may name its own machine `*`. Without a rank, that of a server with one:
/// several have a cache in each behind one address, which is no single cache to know.
pub(super) fn read(body: &[u8], host: &str, rank: Option<u32>) -> Option<KvSource> {
    let mut ranks: BTreeMap<String, Publisher> = serde_json::from_slice(body).ok()?;
    let rank = match rank {
        Some(rank) => ranks.remove(&rank.to_string())?,
        None => ranks.pop_first().filter(|_| ranks.is_empty())?.1,
    };
    if !rank.enable_kv_cache_events || rank.publisher.as_deref() != Some("zmq") {
        return None;
    }
    let address = |text: &str| Address::new(&Url::parse(text).ok()?, Some(host));
    Some(KvSource { events: address(&rank.endpoint)?, replay: rank.replay_endpoint.as_deref().and_then(address) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(body: &str) -> Option<(String, Option<String>)> {
        let source = read(body.as_bytes(), "gpu-a", None)?;
        Some((source.events.to_string(), source.replay.map(|address| address.to_string())))
    }

    #[test]
    fn one_rank_that_publishes() {
        let rank = r#""enable_kv_cache_events":true,"publisher":"zmq","buffer_steps":10000,"hwm":100000,"topic":"""#;
        let own = |rest: &str| format!(r#"{{"0":{{{rank},{rest}}}}}"#);
        assert_eq!(
            shown(&own(r#""endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558""#)),
            Some(("tcp://gpu-a:5557".to_owned(), Some("tcp://gpu-a:5558".to_owned())))
        );
        assert_eq!(
            shown(&own(r#""endpoint":"tcp://10.0.0.1:40123","replay_endpoint":null"#)),
            Some(("tcp://10.0.0.1:40123".to_owned(), None))
        );
        let off = r#"{"0":{"enable_kv_cache_events":false,"publisher":"null","endpoint":"tcp://*:5557"}}"#;
        let two = format!(r#"{{"0":{{{rank},"endpoint":"tcp://*:1"}},"1":{{{rank},"endpoint":"tcp://*:2"}}}}"#);
        for none in ["{}", "", "[]", "null", off, &two, &own(r#""endpoint":"ipc:///tmp/x""#)] {
            assert_eq!(shown(none), None, "{none}");
        }
        let of = |rank| read(two.as_bytes(), "gpu-a", Some(rank)).map(|source| source.events.to_string());
        assert_eq!([0, 1, 2].map(of), [Some("tcp://gpu-a:1".to_owned()), Some("tcp://gpu-a:2".to_owned()), None]);
    }
}
