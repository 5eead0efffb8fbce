//! The lists of workers that change while the gateway runs: one task follows each.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use forebay_backends::discovery::{Lister, Place, Source};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use url::Url;

use crate::config::{Config, Discover, Model, Name, Worker};

/// Lists that wait to be taken over.
const WAITING_MAX: usize = 64;

/// What a list says now.
pub(super) struct Listed {
    source: Source,
    places: Vec<Place>,
}

pub(super) struct Lists {
    tracker: TaskTracker,
    tell: mpsc::Sender<Listed>,
    followed: HashMap<Source, Followed>,
}

struct Followed {
    /// How often it is read.
    every: Duration,
    /// Empty until it was read.
    places: Vec<Place>,
    /// Ends its task.
    _guard: DropGuard,
}

impl Lists {
    pub(super) fn new(tracker: TaskTracker) -> (Self, mpsc::Receiver<Listed>) {
        let (tell, told) = mpsc::channel(WAITING_MAX);
        (Self { tracker, tell, followed: HashMap::new() }, told)
    }

    /// Follows the lists of `config` and no others. What one that stays has said is kept.
    pub(super) fn apply(&mut self, config: &Config) {
        // Of two that read one list, the one in more of a hurry.
        let mut wanted: HashMap<&Source, Duration> = HashMap::new();
        for Discover { source, every, .. } in config.models.iter().flat_map(|model| &model.discover) {
            wanted.entry(source).and_modify(|least| *least = (*least).min(*every)).or_insert(*every);
        }
        self.followed.retain(|source, _| wanted.contains_key(source));
        for (source, every) in wanted {
            let known = self.followed.remove(source);
            let followed = match known {
                Some(known) if known.every == every => known,
                known => {
                    let places = known.map(|known| known.places).unwrap_or_default();
                    Followed { every, places, _guard: self.follow(source.clone(), every) }
                }
            };
            self.followed.insert(source.clone(), followed);
        }
    }

    fn follow(&self, source: Source, every: Duration) -> DropGuard {
        let (over, tell) = (CancellationToken::new(), self.tell.clone());
        let guard = over.clone().drop_guard();
        self.tracker.spawn(over.run_until_cancelled_owned(async move {
            let mut lister = Lister::new(source.clone(), every);
            while tell.send(Listed { source: source.clone(), places: lister.next().await }).await.is_ok() {}
        }));
        guard
    }

    /// Takes over what a list says; false when nobody wants it any more.
    pub(super) fn learn(&mut self, listed: Listed) -> bool {
        let followed = self.followed.get_mut(&listed.source);
        followed.map(|followed| followed.places = listed.places).is_some()
    }

    /// The configuration with the workers that are listed. A name or an address that stands already is left out.
    pub(super) fn complete(&self, mut config: Config) -> Config {
        let mut names: BTreeSet<Name> =
            config.models.iter().flat_map(|model| &model.workers).map(|w| w.name.clone()).collect();
        for model in &mut config.models {
            let mut seen: BTreeSet<(Url, Option<Name>)> =
                model.workers.iter().map(|worker| (worker.url.clone(), worker.model.clone())).collect();
            for worker in self.listed(model) {
                if !seen.insert((worker.url.clone(), worker.model.clone())) {
                    continue;
                }
                if names.insert(worker.name.clone()) {
                    model.workers.push(worker);
                } else {
                    tracing::warn!(worker = %worker.name, model = %model.name, "a listed worker is left out: its name is taken");
                }
            }
        }
        config
    }

    fn listed(&self, model: &Model) -> Vec<Worker> {
        let lists = model.discover.iter().filter_map(|discover| Some((discover, self.followed.get(&discover.source)?)));
        lists
            .flat_map(|(discover, followed)| followed.places.iter().filter_map(|place| worker(discover, place)))
            .collect()
    }
}

/// The worker at a place, as if it stood in the file; `None` where its names cannot stand in a header.
fn worker(discover: &Discover, place: &Place) -> Option<Worker> {
    let (host, port) = (place.url.host_str()?, place.url.port_or_known_default()?);
    let name = place.name.clone().unwrap_or_else(|| format!("{host}:{port}"));
    let model = place.model.as_deref().map(Name::new).transpose();
    let (Ok(name), Ok(model)) = (Name::new(&name), model) else {
        tracing::warn!(worker = %place.url, "a listed worker is left out: its name or model is no name");
        return None;
    };
    Some(Worker {
        engine: discover.engine,
        model: model.or_else(|| discover.model.clone()),
        api_key: discover.api_key.clone(),
        http2: discover.http2,
        ..Worker::new(name, place.url.clone())
    })
}
