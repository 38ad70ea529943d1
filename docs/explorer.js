"use strict";
// The explorer comes here.
