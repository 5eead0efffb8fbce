//! What the owner wants changed of the workers, on its way to who keeps them.

use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};

use crate::dispatch::WorkerStatus;

/// A change.
#[derive(Debug)]
pub enum Change {
    /// A worker with these keys of `[[model.worker]]` joins the model of this name.
    Join { model: String, keys: Map<String, Value> },
    /// The worker of this name gets nothing new.
    Drain(String),
    /// It does again.
    Resume(String),
    /// It drains and is then forgotten.
    Leave(String),
}

/// A change, and who waits for it: told of the workers that it concerns, one for each rank, as they are after it.
pub struct Order {
    pub change: Change,
    pub done: oneshot::Sender<Result<Vec<WorkerStatus>, Refused>>,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// What is asked for makes no worker.
    #[error("{0}")]
    Wrong(String),
    /// There is no model or worker of this name.
    #[error("{0}")]
    Unknown(String),
    /// It cannot be as things stand.
    #[error("{0}")]
    Conflict(String),
    /// It cannot be kept.
    #[error("{0}")]
    Unkept(String),
}

/// Brings a change about; returns when it has been taken over.
///
/// # Errors
/// See [`Refused`].
pub(super) async fn bring(orders: &mpsc::Sender<Order>, change: Change) -> Result<Vec<WorkerStatus>, Refused> {
    let (done, said) = oneshot::channel();
    let stopping = || Refused::Conflict("This gateway is stopping.".to_owned());
    orders.send(Order { change, done }).await.map_err(|_| stopping())?;
    said.await.map_err(|_| stopping())?
}
