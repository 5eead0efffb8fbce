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

/// What is followed, and how often it is read.
pub(super) type List = (Source, Duration);

/// What a list says now.
pub(super) struct Listed {
    list: List,
    places: Vec<Place>,
}

pub(super) struct Lists {
    tracker: TaskTracker,
    tell: mpsc::Sender<Listed>,
    followed: HashMap<List, Followed>,
}

struct Followed {
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
        let wanted: Vec<List> = config.models.iter().flat_map(|model| &model.discover).map(list).collect();
        self.followed.retain(|list, _| wanted.contains(list));
        for list in wanted {
            if !self.followed.contains_key(&list) {
                let followed = Followed { places: Vec::new(), _guard: self.follow(list.clone()) };
                self.followed.insert(list, followed);
            }
        }
    }

    fn follow(&self, list: List) -> DropGuard {
        let (over, tell) = (CancellationToken::new(), self.tell.clone());
        let guard = over.clone().drop_guard();
        self.tracker.spawn(over.run_until_cancelled_owned(async move {
            let mut lister = Lister::new(list.0.clone(), list.1);
            while tell.send(Listed { list: list.clone(), places: lister.next().await }).await.is_ok() {}
        }));
        guard
    }

    /// Takes over what a list says; false when nobody wants it any more.
    pub(super) fn learn(&mut self, listed: Listed) -> bool {
        let followed = self.followed.get_mut(&listed.list);
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
        let lists = model.discover.iter().filter_map(|discover| Some((discover, self.followed.get(&list(discover))?)));
        lists
            .flat_map(|(discover, followed)| followed.places.iter().filter_map(|place| worker(discover, place)))
            .collect()
    }
}

fn list(discover: &Discover) -> List {
    (discover.source.clone(), discover.every)
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
