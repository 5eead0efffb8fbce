//! Looking for engines where nobody configured them. A source of them is one file here.

pub mod local;

use url::Url;

use crate::engines::Detected;

/// An engine that answered.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its address, as the configuration would have it.
    pub url: Url,
    pub detected: Detected,
}
