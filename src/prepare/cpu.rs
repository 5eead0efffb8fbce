//! A bounded pool of threads for work that would hold up the async ones.

use std::thread::Builder;

use crossbeam::channel::{Sender, bounded};
use tokio::sync::oneshot;

/// Jobs that may wait for a thread; beyond that a request is refused at once.
const WAITING_JOBS_MAX: usize = 4096;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that end when the pool is dropped and its queue is empty.
#[derive(Debug, Clone)]
pub(super) struct CpuPool {
    jobs: Sender<Job>,
}

impl CpuPool {
    pub(super) fn start() -> std::io::Result<Self> {
        let (jobs, queue) = bounded::<Job>(WAITING_JOBS_MAX);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        for index in 0..threads {
            let queue = queue.clone();
            Builder::new().name(format!("prepare-{index}")).spawn(move || {
                for job in queue {
                    // A panic in one prompt's work must not take the thread from all others; the caller sees its
                    // result missing.
                    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                }
            })?;
        }
        Ok(Self { jobs })
    }

    /// Runs `work` on the pool. `None` when the queue is full or the work panicked. Work whose caller has gone is
    /// skipped.
    pub(super) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            if !answer.is_closed() {
                let _ = answer.send(work());
            }
        });
        self.jobs.try_send(job).ok()?;
        result.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_refused_and_the_threads_stay() {
        let pool = CpuPool::start().unwrap();
        for _ in 0..64 {
            assert_eq!(pool.run(|| -> u8 { panic!("one prompt's fault") }).await, None);
        }
        assert_eq!(pool.run(|| 7).await, Some(7));
    }
}
